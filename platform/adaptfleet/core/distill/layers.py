"""Hidden states and attention of single layers, and their distance to the teacher's. Shapes: B rows, T tokens, D hidden, H heads, N
labelled positions."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adaptfleet.contracts.distillation import Alignment
from adaptfleet.core.compilation import decoder_layers
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.packed_forward import plain_base

_TINY = 1e-12


@dataclass
class Captured:
    """By the layer's number, from 0."""

    hidden_BTD: dict[int, torch.Tensor] = field(default_factory=dict)
    attention_BHTT: dict[int, torch.Tensor] = field(default_factory=dict)


def layer_map(align: Alignment, num_student: int, num_teacher: int) -> Mapping[int, int]:
    """Layer of the student: layer of the teacher. Spread evenly, the last ones meet."""
    if align.layers is not None:
        return align.layers
    return {i: round((i + 1) * num_teacher / num_student) - 1 for i in range(num_student)}


@contextmanager
def captured(model: AdaptedModel, layers: Collection[int], align: Alignment) -> Iterator[Captured]:
    """What these layers give inside the block. Attention is there only where the model computes it eagerly."""
    found = Captured()
    with ExitStack() as stack:
        modules = decoder_layers(plain_base(model))
        for i in layers:
            if align.hidden:

                def keep_hidden(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
                    found.hidden_BTD[i] = output[0] if isinstance(output, tuple) else output

                stack.enter_context(_hooked(modules[i], keep_hidden))
            if align.attention:

                def keep_attention(_: nn.Module, __: Any, output: Any, i: int = i) -> None:
                    found.attention_BHTT[i] = output[1]

                stack.enter_context(_hooked(attention_of(modules[i]), keep_attention))
        yield found


@contextmanager
def _hooked(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def attention_of(layer: nn.Module) -> nn.Module:
    """The layer's self-attention, whatever the architecture calls it."""
    return next(module for module in layer.modules() if type(module).__name__.endswith("Attention"))


def give_attention(model: PreTrainedModel) -> None:
    """Lets the model compute attention in the open: slower, and the only way to see it."""
    model.set_attn_implementation("eager")


def alignment_loss(
    align: Alignment, layers: Mapping[int, int], student: Captured, teacher: Captured, predicted_BT: torch.Tensor
) -> torch.Tensor:
    """Summed over the N labelled positions, averaged over the pairs of layers, in float32:

    hidden: |s - t|^2 / |t|^2 (FitNets, arXiv 1412.6550, without a scale); attention: KL(teacher || student) over the keys (MiniLM,
    arXiv 2002.10957, averaged over the heads first).
    """
    total = torch.zeros((), device=predicted_BT.device)
    for mine, theirs in layers.items():
        if align.hidden:
            total = total + align.hidden * hidden_distances(
                student.hidden_BTD[mine][:, :-1][predicted_BT], teacher.hidden_BTD[theirs][:, :-1][predicted_BT]
            )
        if align.attention:
            total = total + align.attention * attention_distances(
                student.attention_BHTT[mine].mean(1)[:, :-1][predicted_BT], teacher.attention_BHTT[theirs].mean(1)[:, :-1][predicted_BT]
            )
    return total / len(layers)


def hidden_distances(student_ND: torch.Tensor, teacher_ND: torch.Tensor) -> torch.Tensor:
    """Sum over N of |s - t|^2 / |t|^2."""
    teacher_ND = teacher_ND.float()
    return ((student_ND.float() - teacher_ND).square().sum(-1) / teacher_ND.square().sum(-1).clamp_min(_TINY)).sum()


def attention_distances(student_NT: torch.Tensor, teacher_NT: torch.Tensor) -> torch.Tensor:
    """Sum over N of KL(t || s). Keys that a query must not see have weight 0 in both and add nothing."""
    log_student_NT, log_teacher_NT = student_NT.float().clamp_min(_TINY).log(), teacher_NT.float().clamp_min(_TINY).log()
    return (teacher_NT.float() * (log_teacher_NT - log_student_NT)).sum()
