"""What each unit is worth, all kinds and all measures in one pass over the calibration rows. Kept on disk, so that every ratio is a slice.

Shapes: L layers, T tokens, C channels of the feed-forward, D channels of the residual stream, H query heads, G key-value groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.packed_forward import PackedBatch, summed_loss
from adaptfleet.core.pruning.layout import Layout, layout_of, num_groups

MEASURES = ("activation", "taylor", "magnitude")
PACK_TOKENS = 512


@dataclass(frozen=True)
class Importance:
    """Scores by measure: a unit with a higher score stays longer."""

    mlp_LC: dict[str, torch.Tensor]
    kv_groups_LG: dict[str, torch.Tensor]
    hidden_D: dict[str, torch.Tensor]
    layers_L: torch.Tensor
    """1 - cosine of the residual stream before and after the layer, mean over tokens: block influence, arXiv 2403.03853."""

    def save(self, file: Path) -> None:
        tensors = {"layers": self.layers_L}
        for measure in MEASURES:
            tensors |= {
                f"mlp.{measure}": self.mlp_LC[measure],
                f"kv_groups.{measure}": self.kv_groups_LG[measure],
                f"hidden.{measure}": self.hidden_D[measure],
            }
        unfinished = file.with_name(f".{file.name}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Importance":
        tensors = load_file(file)
        mlp, groups, hidden = ({m: tensors[f"{kind}.{m}"] for m in MEASURES} for kind in ("mlp", "kv_groups", "hidden"))
        return cls(mlp, groups, hidden, tensors["layers"])


@dataclass
class _Sums:
    """Of one layer, over tokens, in float64: |a|, and |sum over the unit of a x gradient|."""

    activation: Any = 0.0
    taylor: Any = 0.0

    def add(self, values_TU: torch.Tensor, terms_TU: torch.Tensor) -> None:
        self.activation = self.activation + values_TU.abs().sum(0, dtype=torch.float64)
        self.taylor = self.taylor + terms_TU.abs().sum(0, dtype=torch.float64)


def measure(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Importance:
    """Forward and backward through the frozen model, once over the rows. The gradient is that of the rows' loss with regard to activations,
    so no weight needs one."""
    layout, config = layout_of(model.config), model.config
    blocks = list(layout.blocks(model))
    groups = num_groups(config)
    mlp, heads, influence = [_Sums() for _ in blocks], [_Sums() for _ in blocks], [0.0] * len(blocks)
    stream = _Sums()
    norms = [block.get_submodule(name) for block in blocks for name in layout.norms] + [model.get_submodule(layout.last_norm)]
    watched: dict[nn.Module, Callable[[torch.Tensor, torch.Tensor], None]] = {}
    for i, block in enumerate(blocks):
        watched[block.get_submodule(layout.mlp_out)] = lambda a, g, i=i: mlp[i].add(a, a * g)  # type: ignore[misc]
        watched[block.get_submodule(layout.attention_out)] = lambda a, g, i=i: _add_groups(heads[i], a, g, groups)  # type: ignore[misc]
    for norm in norms:
        watched[norm] = lambda a, g: stream.add(a, a * g)
    packs = plan_packs([len(row) for row in rows], max(PACK_TOKENS, *(len(row) for row in rows)), list(range(len(rows))))
    num_tokens = sum(len(row) for row in rows)
    for done, pack in enumerate(packs):
        length = sum(len(rows[i]) for i in pack.indices)
        batch = PackedBatch.stack([pack_arrays(pack, rows, length, pad_id)], model.device)
        _pass(model, blocks, batch, watched, influence)
        progress(done + 1, len(packs))
    stacked = {kind: [torch.stack([getattr(s, kind) for s in sums]) for sums in (mlp, heads)] for kind in ("activation", "taylor")}
    mlp_LC = {kind: (values[0] / num_tokens).float() for kind, values in stacked.items()}
    groups_LG = {kind: (values[1] / num_tokens).float() for kind, values in stacked.items()}
    hidden_D = {kind: (getattr(stream, kind) / num_tokens / len(norms)).float() for kind in ("activation", "taylor")}
    mlp_LC["magnitude"], groups_LG["magnitude"], hidden_D["magnitude"] = _magnitudes(model, layout, groups)
    return Importance(mlp_LC, groups_LG, hidden_D, torch.tensor(influence) / num_tokens)


def _pass(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batch: PackedBatch,
    watched: dict[nn.Module, Callable[[torch.Tensor, torch.Tensor], None]],
    influence: list[float],
) -> None:
    handles = []

    def watch(add: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            # a hook that held the tensor it hangs on would keep the whole graph for ever: no collector sees the ring through autograd
            values = arguments[0].detach()
            arguments[0].register_hook(lambda gradient: add(values.flatten(0, -2).float(), gradient.flatten(0, -2).float()))

        return before

    def influenced(i: int) -> Callable[..., None]:
        def after(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            cosine_T = nn.functional.cosine_similarity(arguments[0].detach()[0].float(), result.detach()[0].float(), dim=-1)
            influence[i] += float((1 - cosine_T).sum())

        return after

    def begin(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    try:
        handles.append(model.get_input_embeddings().register_forward_hook(begin))
        for module, add in watched.items():
            handles.append(module.register_forward_pre_hook(watch(add)))
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_hook(influenced(i)))
        with torch.enable_grad():
            (summed_loss(model, batch) / max(1, batch.num_labels)).backward()
    finally:
        for handle in handles:
            handle.remove()


def _add_groups(sums: _Sums, values_TV: torch.Tensor, gradient_TV: torch.Tensor, groups: int) -> None:
    """The inputs of the output projection, head after head; a group's heads stand together."""
    num_tokens = len(values_TV)
    values_TGU = values_TV.view(num_tokens, groups, -1)
    sums.add(values_TGU.norm(dim=-1), (values_TGU * gradient_TV.view(num_tokens, groups, -1)).sum(-1))


@torch.no_grad()
def _magnitudes(model: PreTrainedModel, layout: Layout, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Euclidean norms of each unit's weights."""
    mlp, attention = [], []
    stream = torch.zeros(model.config.hidden_size)
    for block in layout.blocks(model):
        weights = {name: block.get_submodule(name).weight.detach().float() for name in (*layout.mlp_in, layout.mlp_out)}  # type: ignore[operator]
        squares = sum((weights[name].square().sum(1) for name in layout.mlp_in), weights[layout.mlp_out].square().sum(0))
        mlp.append(squares.sqrt())
        out_DV = block.get_submodule(layout.attention_out).weight.detach().float()  # type: ignore[operator]
        attention.append(out_DV.square().sum(0).view(groups, -1).sum(1).sqrt())
        reading = [weights[name] for name in layout.mlp_in]
        reading += [block.get_submodule(name).weight.detach().float() for name in (layout.query, *layout.key_value)]  # type: ignore[operator]
        stream += torch.stack([weight.square().sum(0) for weight in reading]).sum(0).cpu()
    return torch.stack(mlp).cpu(), torch.stack(attention).cpu(), stream.sqrt()
