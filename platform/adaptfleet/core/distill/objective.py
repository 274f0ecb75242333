"""Distillation as an objective of the training loop."""

from collections.abc import Mapping

import torch

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.core.compilation import decoder_layers
from adaptfleet.core.distill.layers import alignment_loss, captured, give_attention, layer_map
from adaptfleet.core.distill.losses import distilled_loss
from adaptfleet.core.distill.teachers import OnlineTeacher, Teacher
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.objectives import Objective
from adaptfleet.core.packed_forward import PackedBatch, plain_base, predictions


class KnowledgeDistillation(Objective):
    """The divergence from the teacher, the hard labels' cross-entropy and the alignment of layers, summed over labelled tokens."""

    def __init__(self, spec: Distillation, teacher: Teacher, student: AdaptedModel) -> None:
        self.spec = spec
        self.teacher = teacher
        self.layers: Mapping[int, int] = {}
        if spec.align.is_on:
            assert isinstance(teacher, OnlineTeacher)
            self.layers = layer_map(spec.align, len(decoder_layers(plain_base(student))), len(decoder_layers(teacher.model)))
        if spec.align.attention:
            give_attention(plain_base(student))

    def summed_loss(self, model: AdaptedModel, batch: PackedBatch) -> torch.Tensor:
        targets, theirs = self.teacher.targets(batch, self.layers.values())
        with captured(model, self.layers, self.spec.align) as mine:
            found = predictions(model, batch)
        loss = distilled_loss(*found, self.hard_labels(batch), targets, self.spec)
        if self.layers:
            loss = loss + alignment_loss(self.spec.align, self.layers, mine, theirs, batch.label_mask_BT[:, 1:])
        return loss

    def hard_labels(self, batch: PackedBatch) -> torch.Tensor:
        """[N] 1 where the label is the data's."""
        return torch.ones(batch.num_labels, device=batch.label_mask_BT.device)
