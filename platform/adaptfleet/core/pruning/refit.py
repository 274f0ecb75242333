"""After units are chosen, before they are cut: the weights of what stays are fitted to what the whole layer gave.

The outputs of a feed-forward are W x, x its channels. With only the kept channels k the best W' in the least-squares sense over the
calibration rows is W' = W H[:, k] H[k, k]^-1, H = sum x x^T (as the layer-wise reconstruction of arXiv 2208.11580, for whole channels). The
same holds for the heads before the attention's output projection. One forward pass, no gradients.
Shapes: D outputs, C inputs of a projection, K of them kept, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.packed_forward import PackedBatch, hidden_states
from adaptfleet.core.pruning.importance import PACK_TOKENS
from adaptfleet.core.pruning.layout import head_size, layout_of, num_groups
from adaptfleet.core.pruning.slicing import Kept

RIDGE = 0.01
"""Added to the diagonal, as a share of its mean: channels that the rows hardly use stay near what they were."""
GRAM_BYTES = 2**30
"""Of the matrices H held at once; more layers are done in several passes over the rows."""


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    kept: Kept,
    rows: Sequence[Encoded],
    pad_id: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Changes the model's weights in place, those of kept units alone; `slicing.sliced` then cuts the others off."""
    places = list(_projections(model, kept))
    done = 0
    for some in _fitting(places):
        grams = _grams(model, [module for module, _ in some], rows, pad_id)
        for (module, inputs), gram_CC in zip(some, grams, strict=True):
            module.weight[:, inputs] = fitted(module.weight, gram_CC, inputs).to(module.weight.dtype)
            done += 1
            progress(done, len(places))


def fitted(weight_DC: torch.Tensor, gram_CC: torch.Tensor, inputs: Sequence[int]) -> torch.Tensor:
    """W' [D, K] in float64: the nearest to W x from the kept inputs alone, ridged towards the weights as they are."""
    keep = torch.tensor(inputs)
    taken = torch.ones(weight_DC.shape[1], dtype=torch.bool)
    taken[keep] = False
    gram_CC = gram_CC.double()
    own_KK = gram_CC[keep][:, keep]
    own_KK = own_KK + RIDGE * own_KK.diagonal().mean().clamp(min=1e-12) * torch.eye(len(keep), dtype=torch.float64)
    weight_DC = weight_DC.double().cpu()
    # what the taken inputs gave, as far as the kept ones tell it
    moved_DK = torch.linalg.solve(own_KK, gram_CC[keep][:, taken] @ weight_DC[:, taken].T).T
    return weight_DC[:, keep] + moved_DK


def _projections(model: PreTrainedModel, kept: Kept) -> Iterator[tuple[nn.Linear, list[int]]]:
    """The output projections of layers that stay and lose inputs, with the inputs that stay."""
    layout, config = layout_of(model.config), model.config
    size, heads_each = head_size(config), config.num_attention_heads // num_groups(config)
    blocks = list(layout.blocks(model))
    for i in kept.layers:
        mlp_out, attention_out = (blocks[i].get_submodule(name) for name in (layout.mlp_out, layout.attention_out))
        assert isinstance(mlp_out, nn.Linear) and isinstance(attention_out, nn.Linear)
        if len(kept.mlp[i]) < mlp_out.in_features:
            yield mlp_out, kept.mlp[i]
        if len(kept.kv_groups[i]) < num_groups(config):
            yield attention_out, [group * heads_each * size + j for group in kept.kv_groups[i] for j in range(heads_each * size)]


def _fitting(places: Sequence[tuple[nn.Linear, list[int]]]) -> Iterator[list[tuple[nn.Linear, list[int]]]]:
    some: list[tuple[nn.Linear, list[int]]] = []
    num_bytes = 0
    for place in places:
        size = 4 * place[0].in_features ** 2
        if some and num_bytes + size > GRAM_BYTES:
            yield some
            some, num_bytes = [], 0
        some.append(place)
        num_bytes += size
    if some:
        yield some


def _grams(model: PreTrainedModel, modules: Sequence[nn.Linear], rows: Sequence[Encoded], pad_id: int) -> list[torch.Tensor]:
    """H of each module's inputs, float32, over all tokens of the rows."""
    grams = [torch.zeros(module.in_features, module.in_features) for module in modules]

    def watch(gram_CC: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs_TC = arguments[0].flatten(0, -2).float()
            gram_CC.add_((inputs_TC.T @ inputs_TC).cpu())

        return before

    handles = [module.register_forward_pre_hook(watch(gram)) for module, gram in zip(modules, grams, strict=True)]
    try:
        for pack in plan_packs([len(row) for row in rows], max(PACK_TOKENS, *(len(row) for row in rows)), list(range(len(rows)))):
            length = sum(len(rows[i]) for i in pack.indices)
            hidden_states(model, PackedBatch.stack([pack_arrays(pack, rows, length, pad_id)], model.device))
    finally:
        for handle in handles:
            handle.remove()
    return grams
