"""How much each linear layer's rounding harms the loss, measured for all layers in one forward and backward pass over the rows.

A layer's rounding moves its output by dy = (W_rounded - W) x. To second order, with the empirical Fisher information in the place of the
Hessian, that costs 1/2 (g . dy)^2 a token, g the gradient of the loss with regard to the output (as in arXiv 2306.07629, there for single
weights). Shapes: T tokens, O outputs, I inputs, G groups.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.methods.targets import linear_modules
from adaptfleet.core.packed_forward import PackedBatch, summed_loss

BITS = (4, 8)
PACK_TOKENS = 512


def rounded_weight(weight_OI: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Rounded to nearest, symmetric, the scale from the largest weight of each group (None: of each row)."""
    groups_OGI = weight_OI.float().view(len(weight_OI), -1, group_size or weight_OI.shape[1])
    limit = 2 ** (bits - 1)
    scale_OG1 = groups_OGI.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (limit - 0.5)
    return ((groups_OGI / scale_OG1).round().clamp(-limit, limit - 1) * scale_OG1).view_as(weight_OI)


def harm(model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, group_size: int) -> dict[str, dict[str, float]]:
    """By full name and bits: nats a labelled token that rounding the layer to 4 bits in groups, or to 8 by rows, is expected to cost."""
    modules = {name: model.get_submodule(name) for name in linear_modules(model)}
    total = {name: dict.fromkeys(map(str, BITS), 0.0) for name in modules}
    num_labels = 0
    packs = plan_packs([len(row) for row in rows], max(PACK_TOKENS, *(len(row) for row in rows)), list(range(len(rows))))
    handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.detach().requires_grad_())]
    handles += [module.register_forward_hook(_watch(module, total[name], group_size)) for name, module in modules.items()]
    try:
        for pack in packs:
            length = sum(len(rows[i]) for i in pack.indices)
            batch = PackedBatch.stack([pack_arrays(pack, rows, length, pad_id)], model.device)
            num_labels += batch.num_labels
            with torch.enable_grad():
                summed_loss(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: {bits: value / max(1, num_labels) for bits, value in by_bits.items()} for name, by_bits in total.items()}


def _watch(module: nn.Module, total: dict[str, float], group_size: int) -> Callable[..., None]:
    def after(_: nn.Module, arguments: tuple[Any, ...], output_BTO: torch.Tensor) -> None:
        inputs_TI = arguments[0].detach().flatten(0, -2)

        @torch.no_grad()
        def add(gradient_BTO: torch.Tensor) -> None:
            gradient_TO = gradient_BTO.flatten(0, -2)
            weight_OI = module.weight.detach()  # type: ignore[operator]
            for bits in BITS:
                moved_OI = rounded_weight(weight_OI, bits, group_size if bits == 4 else None) - weight_OI.float()
                moved_TO = inputs_TI @ moved_OI.T.to(inputs_TI.dtype)
                total[str(bits)] += float(0.5 * (gradient_TO.float() * moved_TO.float()).sum(-1).square().sum())

        output_BTO.register_hook(add)

    return after
