"""The one call that training and its evaluation make: packed rows in, summed loss out. Shapes: B rows, T tokens, N labelled positions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel, PeftType, PromptLearningConfig
from torch.nn import functional as F  # noqa: N812  the name everyone knows
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ModelError
from adaptfleet.core.losses import summed_cross_entropy, token_log_probs
from adaptfleet.core.segment_attention import segment_mask, takes_segments


@dataclass(frozen=True)
class PackedBatch:
    """B packed rows. Segments number the examples of a row; attention stays inside a segment."""

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    segment_ids_BT: torch.Tensor
    label_mask_BT: torch.Tensor
    """True where the token is to be predicted (from the one before it)."""
    rows: tuple[int, ...] = ()
    """Numbers of the training rows in it, in the order in which they stand; empty where nobody asks for them."""

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


Call = Callable[[Callable[[Any, PackedBatch], Any], PackedBatch], Any]
"""Calls a function of the model and a batch, with all of the model's parameters at hand."""


def plain_base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model inside, its layers adapted or not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def num_virtual_tokens(model: PreTrainedModel | PeftModel) -> int:
    """Of prefix and prompt tuning; 0 for other methods."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config.num_virtual_tokens if isinstance(config, PromptLearningConfig) else 0


def hidden_states(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> torch.Tensor:
    """The last hidden states [B, T, D]. The mask is given whole, so nothing depends on how transformers detects packed rows.

    A learnt prefix or prompt stands once before each row and every segment sees it; positions go on after it, as if it stood before
    each example alone.
    """
    base, num_virtual = plain_base(model), num_virtual_tokens(model)
    learnt: Any = model
    position_ids_BT = batch.position_ids_BT + num_virtual
    if not num_virtual:
        ids_BT = batch.segment_ids_BT
        mask = ids_BT[:, None, None] if takes_segments(base) else segment_mask(ids_BT, base.dtype)
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": mask}
    elif learnt.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        inputs = {
            "input_ids": batch.input_ids_BT,
            "attention_mask": segment_mask(batch.segment_ids_BT, base.dtype, num_virtual),
            "past_key_values": learnt.get_prompt(batch_size=len(batch.input_ids_BT)),
        }
    else:
        prompt_BPD = learnt.get_prompt(batch_size=len(batch.input_ids_BT)).to(base.dtype)
        own_BP = torch.arange(num_virtual, device=base.device).expand(len(prompt_BPD), -1)
        position_ids_BT = torch.cat([own_BP, position_ids_BT], dim=1)
        seen_BTK = segment_mask(batch.segment_ids_BT, base.dtype, num_virtual)
        own_BPK = segment_mask(torch.zeros_like(own_BP), base.dtype)
        own_BPK = F.pad(own_BPK, (0, batch.input_ids_BT.shape[1]), value=torch.finfo(base.dtype).min)
        inputs = {
            "inputs_embeds": torch.cat([prompt_BPD, base.get_input_embeddings()(batch.input_ids_BT)], dim=1),
            "attention_mask": torch.cat([own_BPK, seen_BTK], dim=2),
        }
    hidden_BTD = base.base_model(**inputs, position_ids=position_ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD[:, -batch.input_ids_BT.shape[1] :]


class Predictions(NamedTuple):
    """What the logits of the labelled tokens are made of, and the tokens."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    labels_N: torch.Tensor


def predictions(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> Predictions:
    hidden_BTD = hidden_states(model, batch)
    predicted_BT = batch.label_mask_BT[:, 1:]
    head: Any = plain_base(model).get_output_embeddings()
    return Predictions(hidden_BTD[:, :-1][predicted_BT], head.weight, getattr(head, "bias", None), batch.input_ids_BT[:, 1:][predicted_BT])


def summed_loss(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> torch.Tensor:
    """The cross-entropies of all labelled tokens, summed; the caller divides by the step's global number of labels."""
    return summed_cross_entropy(*predictions(model, batch))


def label_log_probs(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> torch.Tensor:
    """[N] the log probability of each labelled token in nats, float32. The head gets no gradient."""
    return token_log_probs(*predictions(model, batch))


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
    if not _head_is_all_there_is(model, second[None].to(model.device), alone_TD):
        raise ModelError(
            f"{type(model).__name__} does more to its logits than one linear output head (a scale or a soft cap); it is not supported yet."
        )


def _head_is_all_there_is(model: PreTrainedModel, input_ids_1T: torch.Tensor, hidden_TD: torch.Tensor) -> bool:
    """Whether the output head takes the last hidden states as they are, and its results are the logits."""
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda head, given, result: passed.append((given[0], result)))
    try:
        logits_TV = model(input_ids=input_ids_1T, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    if len(passed) != 1:
        return False
    taken_TD, given_TV = (tensor[0].float() for tensor in passed[0])
    # One forward pass, so nothing but an operation between can differ. The hidden states are of two passes: those of a model with rounded
    # activations differ by percents where one lands on an edge, while a scale differs by its size.
    return bool((logits_TV - given_TV).norm() <= 1e-3 * logits_TV.norm() and (taken_TD - hidden_TD).norm() <= 0.1 * hidden_TD.norm())
