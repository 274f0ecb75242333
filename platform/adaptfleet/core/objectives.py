"""The losses a run can have, each summed over its units: labelled tokens, or pairs of a chosen and a rejected answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F  # noqa: N812  the name everyone knows

from adaptfleet.contracts import objectives as contracts
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.packed_forward import Call, PackedBatch, label_log_probs, num_virtual_tokens, plain_base, summed_loss
from adaptfleet.core.steps import StepPlan


class Objective:
    """Supervised fine-tuning; preferences are a subclass each."""

    def num_units(self, rows: Iterable[Any]) -> int:
        """What the loss is a mean over, in these rows."""
        return sum(row.num_labels for row in rows)

    def summed_loss(self, model: AdaptedModel, batch: PackedBatch) -> torch.Tensor:
        return summed_loss(model, batch)

    def rows_of_step(self, model: AdaptedModel, call: Call, rows: Sequence[Any], plan: StepPlan, step: int) -> Sequence[Any]:
        """What the step trains on: the data's rows, unless an objective makes rows of its own. All workers ask, before each step."""
        return rows

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs beside the trained parameters."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""


class Preference(Objective, ABC):
    """A row holds a chosen and a rejected answer to one prompt, in segments 2j and 2j + 1 of the packed row."""

    def num_units(self, rows: Iterable[Any]) -> int:
        return sum(1 for _ in rows)

    def summed_loss(self, model: AdaptedModel, batch: PackedBatch) -> torch.Tensor:
        return self.losses_and_margins(model, batch)[0].sum()

    @abstractmethod
    def losses_and_margins(self, model: AdaptedModel, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each pair of the batch: its loss, and by how much the chosen answer is preferred (above 0: it is)."""


class DirectPreference(Preference):
    def __init__(self, spec: contracts.Dpo) -> None:
        self.spec = spec

    def losses_and_margins(self, model: AdaptedModel, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """-log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), equation 7 of arXiv 2305.18290."""
        log_probs_P2, _ = pair_log_probs(model, batch)
        with torch.no_grad(), base_alone(model) as base:
            reference_P2, _ = pair_log_probs(base, batch)
        rewards_P2 = self.spec.beta * (log_probs_P2 - reference_P2)
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        smoothing = self.spec.label_smoothing
        losses_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
        return losses_P, margin_P.detach()


class OddsRatioPreference(Preference):
    def __init__(self, spec: contracts.Orpo) -> None:
        self.spec = spec

    def losses_and_margins(self, model: AdaptedModel, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the chosen answer, and -log sigmoid of the log odds ratio, equations 6 and 7 of arXiv 2403.07691."""
        log_probs_P2, lengths_P2 = pair_log_probs(model, batch)
        mean_P2 = log_probs_P2 / lengths_P2
        # log odds: log p - log(1 - p)
        odds_P2 = mean_P2 - torch.log1p(-mean_P2.exp().clamp(max=1 - 1e-6))
        margin_P = odds_P2[:, 0] - odds_P2[:, 1]
        return -mean_P2[:, 0] - self.spec.weight * F.logsigmoid(margin_P), margin_P.detach()


def objective(spec: contracts.Sft | contracts.Dpo | contracts.Orpo) -> Objective:
    """Of a model alone; `distill` has the objective that needs a teacher beside it."""
    match spec:
        case contracts.Sft():
            return Objective()
        case contracts.Dpo():
            return DirectPreference(spec)
        case contracts.Orpo():
            return OddsRatioPreference(spec)
        case _:
            assert_never(spec)


def pair_log_probs(model: AdaptedModel, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """[P, 2] each: the log probability of the chosen and of the rejected answer of every pair, in nats, and their labelled tokens."""
    log_probs_N = label_log_probs(model, batch)
    predicted_BT = batch.label_mask_BT[:, 1:]
    num_rows = len(batch.segment_ids_BT)
    # an even number of segments a row, so that pairs never reach into the next one
    per_row = int(batch.segment_ids_BT.max()) // 2 * 2 + 2
    rows_BT = torch.arange(num_rows, device=batch.segment_ids_BT.device)[:, None] * per_row
    segments_N = (batch.segment_ids_BT + rows_BT)[:, 1:][predicted_BT]
    shape = num_rows * per_row
    sums_S = log_probs_N.new_zeros(shape).index_add(0, segments_N, log_probs_N)
    counts_S = log_probs_N.new_zeros(shape).index_add(0, segments_N, torch.ones_like(log_probs_N))
    there_P = (counts_S.view(-1, 2) > 0).all(dim=1)
    return sums_S.view(-1, 2)[there_P], counts_S.view(-1, 2)[there_P]


@contextmanager
def base_alone(model: AdaptedModel) -> Iterator[AdaptedModel]:
    """The model as it was before its method was attached. No parameter's `requires_grad` is touched, as peft's own switch would."""
    if num_virtual_tokens(model):
        yield plain_base(model)
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False
