"""The training loop: packed rows, one update a step, the same losses for any number of workers. Knows nothing of Ray."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from adaptfleet.contracts.errors import DivergedError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.methods.adaptation import Adaptation, AdaptedModel
from adaptfleet.core.objectives import Objective
from adaptfleet.core.optimizer import MasterAdamW
from adaptfleet.core.packed_forward import Call, PackedBatch
from adaptfleet.core.schedule import warmup_cosine
from adaptfleet.core.sharding import DATA
from adaptfleet.core.steps import StepPlan

TOKENS_PER_PASS = 4096
"""Positions of one forward and backward pass; more are split into several passes whose gradients add up."""


def rows_per_pass(pack_tokens: int) -> int:
    return max(1, TOKENS_PER_PASS // pack_tokens)


@dataclass(frozen=True)
class StepResult:
    step: int
    """From 1: the number of updates made."""
    loss: float
    """The objective's mean over all workers: for supervised fine-tuning the cross-entropy of a labelled token, in nats."""
    learning_rate: float
    grad_norm: float
    num_tokens: int
    """Tokens of the step over all workers."""


class Trainer:
    """Trains the parameters that require gradients. With torch.distributed running, gradients are summed over its workers: by FSDP for
    parameters it has sharded, here for all others."""

    def __init__(
        self,
        model: AdaptedModel,
        adaptation: Adaptation,
        train: TrainSpec,
        plan: StepPlan,
        rows: Rows | list[Encoded],
        pad_id: int,
        objective: Objective | None = None,
        call: Call | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """`objective`: None means supervised fine-tuning. `call` calls a function of the model and a batch: `shard` gives one where the
        parameters must be gathered for it. `mesh`: that of `shard`; None: each worker takes a share of its own."""
        self.model = model
        self.adaptation = adaptation
        self.train = train
        self.plan = plan
        self.rows = rows
        self.pad_id = pad_id
        self.objective = objective or Objective()
        self.call = call or (lambda function, batch: function(model, batch))
        self.optimizer = MasterAdamW(model, train.weight_decay)
        self.step = 0
        self._step_rows: Sequence[Any] = rows
        self.rank, self.num_shares = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._group = None
        if mesh is not None:
            self.rank, self.num_shares, self._group = mesh[DATA].get_local_rank(), mesh[DATA].size(), mesh[DATA].get_group()
        self._is_sharded = any(isinstance(p, DTensor) for p in model.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs but the step."""
        parts = {"method": self.adaptation.state(), "objective": self.objective.state()}
        return self.optimizer.state() | {f"{part}.{key}": value.clone() for part, state in parts.items() for key, value in state.items()}

    def load_state(self, state: dict[str, torch.Tensor], step: int) -> None:
        self.optimizer.load_state(state)
        for part in (self.adaptation, self.objective):
            prefix = "method." if part is self.adaptation else "objective."
            part.load_state({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
        self.step = step

    def run(self, until: int | None = None) -> Iterator[StepResult]:
        """Goes on from `self.step` to the plan's end, or to step `until` of it, an update at a time."""
        self.adaptation.begin(self.model, len(self.plan.steps))
        self.model.train()
        while self.step < (len(self.plan.steps) if until is None else until):
            yield self._update()

    def _update(self) -> StepResult:
        packs = self.plan.steps[self.step]
        self._step_rows = self.objective.rows_of_step(self.model, self.call, self.rows, self.plan, self.step)
        # Known to every worker without a message: the mean is over the step's labels (or pairs), not over each worker's.
        num_units = self.objective.num_units(self._step_rows[i] for pack in packs for i in pack.indices)
        # Dropout draws anew each step, and a resumed step draws what the first try drew.
        torch.manual_seed(hash((self.train.seed, self.step, self.rank)))
        total = torch.zeros(())
        for batch in self._passes():
            summed = self.call(self.objective.summed_loss, batch)
            (summed / num_units).backward()
            total += summed.detach().cpu()
        penalty = self.adaptation.penalty(self.model)
        if penalty is not None:
            # each share adds its part of it, for gradients are summed
            (penalty / self.num_shares).backward()
        if self.num_shares > 1:
            total = self._sum_over_workers(total)
        loss = float(total) / num_units
        if not math.isfinite(loss):
            first = packs[0].indices[:5]
            raise DivergedError(
                f"the loss of step {self.step + 1} is {loss}; the last checkpoint is kept. "
                f"The step's first training rows are {list(first)}. "
                f"Lower train.learning_rate (now {self.train.learning_rate}) or look at these rows."
            )
        learning_rate = self.train.learning_rate * warmup_cosine(self.step, len(self.plan.steps), self.train.warmup_fraction)
        norm = self.optimizer.step(learning_rate, self.train.max_grad_norm)
        self.step += 1
        self.optimizer.take_zeros(self.adaptation.after_step(self.model, self.step))
        self.optimizer.zero_grad()
        num_tokens = sum(len(self._step_rows[i]) for pack in packs for i in pack.indices)
        return StepResult(self.step, loss, learning_rate, norm, num_tokens)

    def _passes(self) -> Iterator[PackedBatch]:
        """This worker's share of the step. Where parameters are sharded every worker makes as many passes, the last perhaps without labels:
        each pass gathers them from all."""
        mine = self.plan.share(self.step, self.rank, self.num_shares)
        num_rows = rows_per_pass(self.plan.pack_tokens)
        num_passes = math.ceil(len(mine) / num_rows)
        for begin in range(0, len(mine), num_rows):
            yield self.batch(mine[begin : begin + num_rows])
        if self._is_sharded:
            longest = len(self.plan.share(self.step, 0, self.num_shares))
            for _ in range(math.ceil(longest / num_rows) - num_passes):
                idle = self.batch(self.plan.steps[self.step][:1])
                yield replace(idle, label_mask_BT=torch.zeros_like(idle.label_mask_BT))

    def batch(self, packs: list[Pack]) -> PackedBatch:
        arrays = [pack_arrays(pack, self._step_rows, self.plan.pack_tokens, self.pad_id) for pack in packs]
        return replace(PackedBatch.stack(arrays, self.model.device), rows=tuple(i for pack in packs for i in pack.indices))

    def _sum_over_workers(self, total: torch.Tensor) -> torch.Tensor:
        """Adds the loss and all gradients that FSDP has not added, over the workers in one message, in float32."""
        parameters = [p for p in self.optimizer.parameters.values() if not isinstance(p, DTensor)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([total.to(self.model.device).reshape(1), *(g.float().reshape(-1) for g in gradients)])
        dist.all_reduce(flat, group=self._group)
        offset = 1
        for parameter in parameters:
            part = flat[offset : offset + parameter.numel()].view_as(parameter)
            # float32 sums stay float32: the optimizer takes them as they are
            parameter.grad = part.to(parameter.dtype)
            offset += parameter.numel()
        return flat[0].cpu()
