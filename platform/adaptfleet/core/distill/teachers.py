"""Where the teacher's distributions come from: the teacher beside the student, or what it said before."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  the name everyone knows
from transformers import PreTrainedModel

from adaptfleet.contracts.distillation import Alignment, Distillation
from adaptfleet.core.distill.layers import Captured, captured, give_attention
from adaptfleet.core.distill.losses import Distributions, Targets
from adaptfleet.core.packed_forward import Call, PackedBatch, predictions


class Teacher(ABC):
    @abstractmethod
    def targets(self, batch: PackedBatch, layers: Collection[int]) -> tuple[Targets, Captured]:
        """The distributions of the batch's N labelled positions, and what the given layers gave on the way."""


class OnlineTeacher(Teacher):
    """A frozen model. It belongs to no module of the student, so it is in none of its checkpoints."""

    def __init__(self, model: PreTrainedModel, spec: Distillation, vocab_size: int, call: Call | None = None) -> None:
        """`vocab_size`: of the student's head. `call`: as the training loop has it, where the teacher is sharded."""
        self.model = model.requires_grad_(False).eval()
        self.align: Alignment = spec.align
        self.temperature = spec.temperature
        self.vocab_size = vocab_size
        self.call = call or (lambda function, batch: function(self.model, batch))
        if spec.align.attention:
            give_attention(model)

    @torch.no_grad()
    def targets(self, batch: PackedBatch, layers: Collection[int]) -> tuple[Targets, Captured]:
        found: Captured
        found, hidden_ND, weight_VD, bias_V = self.call(lambda model, batch: self._run(model, batch, layers), batch)

        @torch.no_grad()
        def distributions(part: slice) -> Distributions:
            return Distributions(log_probs(hidden_ND[part], weight_VD, bias_V, self.temperature, self.vocab_size))

        return distributions, found

    def _run(self, model: PreTrainedModel, batch: PackedBatch, layers: Collection[int]) -> tuple[Any, ...]:
        with captured(model, layers, self.align) as found:
            # of a sharded model the head is kept whole after the call, as FSDP does with what is around the layers
            made = predictions(model, batch)
        return found, made.hidden_ND, made.weight_VD, made.bias_V


def log_probs(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature: float, vocab_size: int
) -> torch.Tensor:
    """[C, V] in nats, float32, over at most the first `vocab_size` tokens."""
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()[:, :vocab_size]
    return torch.log_softmax(logits_CV / temperature, dim=-1)
