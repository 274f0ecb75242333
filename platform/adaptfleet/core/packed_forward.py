"""The one call that training and its evaluation make: packed rows in, summed loss out. Shapes: B rows, T tokens, N labelled positions."""

from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ModelError
from adaptfleet.core.losses import summed_cross_entropy


@dataclass(frozen=True)
class PackedBatch:
    """B packed rows. Segments number the examples of a row; attention stays inside a segment."""

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    segment_ids_BT: torch.Tensor
    label_mask_BT: torch.Tensor
    """True where the token is to be predicted (from the one before it)."""

    @classmethod
    def stack(cls, rows: list[dict[str, np.ndarray]], device: torch.device) -> "PackedBatch":
        def tensor(key: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.stack([row[key] for row in rows])).to(device=device, dtype=dtype)

        return cls(
            tensor("input_ids_T", torch.long),
            tensor("position_ids_T", torch.long),
            tensor("segment_ids_T", torch.long),
            tensor("label_mask_T", torch.bool),
        )

    @property
    def num_labels(self) -> int:
        return int(self.label_mask_BT[:, 1:].sum())


def segment_mask(segment_ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, T, T], 0 where the key is of the query's segment and not after it, else the type's lowest number."""
    num_tokens = segment_ids_BT.shape[1]
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segment_ids_BT.device).tril_()
    allowed_BTT = same_BTT & causal_TT
    mask_BTT = torch.zeros(allowed_BTT.shape, dtype=dtype, device=segment_ids_BT.device)
    return mask_BTT.masked_fill_(~allowed_BTT, torch.finfo(dtype).min)[:, None]


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def hidden_states(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> torch.Tensor:
    """The last hidden states [B, T, D]. The mask is given whole, so nothing depends on how transformers detects packed rows."""
    base = _base(model)
    return base.base_model(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        attention_mask=segment_mask(batch.segment_ids_BT, base.dtype),
        use_cache=False,
    ).last_hidden_state


def summed_loss(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> torch.Tensor:
    """The cross-entropies of all labelled tokens, summed; the caller divides by the step's global number of labels."""
    hidden_BTD = hidden_states(model, batch)
    predicted_BT = batch.label_mask_BT[:, 1:]
    head = _base(model).get_output_embeddings()
    return summed_cross_entropy(
        hidden_BTD[:, :-1][predicted_BT], head.weight, getattr(head, "bias", None), batch.input_ids_BT[:, 1:][predicted_BT]
    )


@torch.no_grad()
def check_packable(model: PreTrainedModel, vocab_size: int, pack_tokens: int, longest: int) -> None:
    """ModelError unless packed rows give what separate rows give, and the output head is one linear map.

    Measured on the model itself, so it holds for any architecture: a second example's hidden states must not depend on the first.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ModelError(
            f"the longest example has {longest} tokens, but the model has {positions} positions; use train.truncate or shorter rows."
        )
    window = getattr(model.config, "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True) and longest > window:
        raise ModelError(f"the longest example has {longest} tokens, more than the model's sliding window of {window}; use shorter rows.")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, vocab_size, (n,), generator=generator) for n in (7, 9))

    def batch(*examples: torch.Tensor) -> PackedBatch:
        ids = torch.cat(examples)[None].to(model.device)
        positions = torch.cat([torch.arange(len(e)) for e in examples])[None].to(model.device)
        segments = torch.cat([torch.full((len(e),), i) for i, e in enumerate(examples)])[None].to(model.device)
        return PackedBatch(ids, positions, segments, torch.ones_like(ids, dtype=torch.bool))

    try:
        packed_TD = hidden_states(model, batch(first, second))[0].float()
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids or mask as packing needs them: {error}") from None
    alone_TD = hidden_states(model, batch(second))[0].float()
    scale = alone_TD.norm()
    leak = (packed_TD[len(first) :] - alone_TD).norm() / scale
    tolerance = (
        2e-2 if model.dtype == torch.bfloat16 else 1e-3
    )  # rounding of one type over all layers, not leakage: that measures 0.3 and more
    if not leak <= tolerance:
        raise ModelError(
            f"{type(model).__name__} lets packed examples see each other (relative difference {leak:.3f}); it cannot be trained packed."
        )
    logits_TV = model(input_ids=second[None].to(model.device), use_cache=False).logits[0].float()
    own_TV = model.get_output_embeddings()(alone_TD.to(model.dtype)).float()
    if not (logits_TV - own_TV).norm() / logits_TV.norm() <= tolerance:
        raise ModelError(
            f"{type(model).__name__} does more to its logits than one linear output head (a scale or a soft cap); it is not supported yet."
        )
