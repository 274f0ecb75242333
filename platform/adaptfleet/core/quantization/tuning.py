"""Healing a rounded checkpoint in place: the scales of its rounded layers are learnt, the codes stay (as the end-to-end phase of
EfficientQAT, arXiv 2407.11062). The result has the same format, bytes and speed.

Shapes: O outputs, I inputs, G groups of inputs, T tokens.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812  the name everyone knows
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.loop import StepResult, Trainer
from adaptfleet.core.methods.adaptation import Adaptation
from adaptfleet.core.methods.targets import linear_modules
from adaptfleet.core.objectives import Objective
from adaptfleet.core.quantization.dequantization import dequantized, group_of
from adaptfleet.core.steps import plan_steps

_SCALE = "weight_scale"


class ScaledProduct(torch.autograd.Function):
    """x (codes x scale)^T with the gradients of x and of the scale. The weight is made anew for the backward pass: kept, all layers'
    weights would lie in memory twice more."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, codes_OI: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TI, codes_OI, scale_OG)
        return F.linear(x_TI, _weight(codes_OI, scale_OG, x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, gradient_TO: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x_TI, codes_OI, scale_OG = ctx.saved_tensors
        gradient_OI = gradient_TO.flatten(0, -2).T @ x_TI.flatten(0, -2)
        num_outputs, num_groups = scale_OG.shape
        by_group_OG = (gradient_OI.float() * codes_OI).view(num_outputs, num_groups, -1).sum(-1)
        return gradient_TO @ _weight(codes_OI, scale_OG, x_TI.dtype), None, by_group_OG.to(scale_OG.dtype)


def _weight(codes_OI: torch.Tensor, scale_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    num_outputs, num_groups = scale_OG.shape
    return (codes_OI.to(dtype).view(num_outputs, num_groups, -1) * scale_OG.to(dtype).unsqueeze(-1)).view(num_outputs, -1)


class RoundedLinear(nn.Module):
    """A linear layer of codes and learnt scales: those of the checkpoint times 1 + `change`, as the checkpoint's type rounds them."""

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, codes_OI: torch.Tensor, scale_OG: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scale", scale_OG)
        self.register_buffer("bias", bias_O)
        self.change = nn.Parameter(torch.zeros(scale_OG.shape, dtype=torch.float32))

    def learnt_scale(self) -> torch.Tensor:
        return (self.scale.float() * (1 + self.change)).to(self.scale.dtype)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        product: Any = ScaledProduct.apply(x_TI, self.codes, self.learnt_scale())
        return product if self.bias is None else product + self.bias


class ScaleTuning(Adaptation):
    """Trains the rounded layers' scales. `stored`: the checkpoint's tensors by name."""

    def __init__(self, stored: dict[str, torch.Tensor], bits_of: Callable[[str], int]) -> None:
        self.stored = stored
        self.bits_of = bits_of

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """`model` as `load_compressed` gives it; hooks that round a layer's inputs stay with it."""
        model.requires_grad_(False)
        for name in linear_modules(model):
            if f"{name}.{_SCALE}" not in self.stored:
                continue
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): tensor for key, tensor in self.stored.items() if key.startswith(prefix)}
            if "weight_g_idx" in parts:
                raise ModelError(f"{name}'s inputs are grouped out of their order (weight_g_idx), which tune does not know; leave it out.")
            scale_OG = parts[_SCALE]
            ones = {**parts, _SCALE: torch.ones_like(scale_OG)}
            codes_OI = dequantized(ones, self.bits_of(name)).to(torch.int8)
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            rounded = RoundedLinear(codes_OI, scale_OG, linear.bias).to(linear.weight.device)
            rounded._forward_pre_hooks.update(linear._forward_pre_hooks)
            model.set_submodule(name, rounded)
        return model

    def scales(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The learnt ones by the checkpoint's names."""
        return {
            f"{name}.{_SCALE}": module.learnt_scale().detach().cpu().contiguous()
            for name, module in model.named_modules()
            if isinstance(module, RoundedLinear)
        }


def read_stored(folder: Path) -> tuple[dict[str, torch.Tensor], Callable[[str], int]]:
    """A compressed checkpoint's tensors, and the bits of each rounded module."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return stored, lambda name: int(group_of(name, quantization)["weights"]["num_bits"])


def tune(
    model: PreTrainedModel,
    folder: Path,
    train: TrainSpec,
    rows: Sequence[Encoded],
    pad_id: int,
    objective: Callable[[PreTrainedModel], Objective],
    progress: Callable[[StepResult, int], None] = lambda result, total: None,
) -> dict[str, torch.Tensor]:
    """Trains, and returns the learnt scales by the checkpoint's names. `model`: that of `folder`, as `load_base` gives it."""
    adapted = ScaleTuning(*read_stored(folder))
    student = adapted.attach(model, train.seed)
    plan = plan_steps(list(rows), train)
    trainer = Trainer(student, adapted, train, plan, list(rows), pad_id, objective(student))
    for result in trainer.run():
        progress(result, len(plan.steps))
    return adapted.scales(student)


def write_tuned(folder: Path, out: Path, scales: dict[str, torch.Tensor]) -> None:
    """The checkpoint of `folder` with other scales, in `out`. ModelError: scales that the checkpoint does not have."""
    left = set(scales)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
            continue
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(file)
        mine = {name: scales[name].to(tensors[name].dtype) for name in scales if name in tensors}
        left -= set(mine)
        save_file({**tensors, **mine}, out / file.name, metadata=metadata)
    if left:
        raise ModelError(f"{folder} has no {', '.join(sorted(left)[:3])}.")
