"""Which packs each optimizer step takes: a plan of the whole run, the same for every number of workers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.mixture import Mixture
from adaptfleet.core.data.packing import Pack, PackTable, pack_table
from adaptfleet.core.data.tokens import Rows

_SUMMED_TOGETHER = 65_536


@dataclass(frozen=True)
class Steps(Sequence[list[Pack]]):
    """The packs of each optimizer step, over all workers. A last step may hold fewer."""

    packs: PackTable
    packs_per_step: int

    def __len__(self) -> int:
        return -(-len(self.packs) // self.packs_per_step)

    @overload
    def __getitem__(self, step: int) -> list[Pack]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[Pack]]: ...
    def __getitem__(self, step: int | slice) -> list[Pack] | list[list[Pack]]:
        if isinstance(step, slice):
            return [self[s] for s in range(*step.indices(len(self)))]
        first = range(len(self))[step] * self.packs_per_step
        return self.packs[first : first + self.packs_per_step]

    def __iter__(self) -> Iterator[list[Pack]]:
        return (self[step] for step in range(len(self)))


@dataclass(frozen=True)
class StepPlan:
    steps: Steps
    pack_tokens: int
    num_tokens: int
    """Tokens of all steps, padding left out."""
    fill: float
    """Share of the packed positions that hold a token."""

    def share(self, step: int, rank: int, num_workers: int) -> list[Pack]:
        """A worker's packs of a step: every `num_workers`-th, so that each worker's load is alike."""
        return self.steps[step][rank::num_workers]

    def save(self, folder: Path) -> None:
        """Writes the plan as arrays, for `load_plan`."""
        np.save(folder / "plan-indices.npy", self.steps.packs.indices_N)
        np.save(folder / "plan-starts.npy", self.steps.packs.starts_P)
        np.save(folder / "plan-sizes.npy", np.asarray([self.steps.packs_per_step, self.pack_tokens, self.num_tokens]))


def load_plan(folder: Path) -> StepPlan:
    """A saved plan, mapped into memory."""
    packs = PackTable(np.load(folder / "plan-indices.npy", mmap_mode="r"), np.load(folder / "plan-starts.npy", mmap_mode="r"))
    packs_per_step, pack_tokens, num_tokens = np.load(folder / "plan-sizes.npy").tolist()
    return StepPlan(Steps(packs, packs_per_step), pack_tokens, num_tokens, num_tokens / (len(packs) * pack_tokens))


def plan_steps(rows: Rows | Sequence[Encoded], train: TrainSpec, mixture: Mixture | None = None) -> StepPlan:
    """Epoch after epoch in its seeded order, packed, cut into steps of `num_packs`.

    Without a mixture each row comes once an epoch. Of a fraction of an epoch its order's beginning is taken.
    """
    lengths_N = rows.lengths if isinstance(rows, Rows) else np.asarray([len(row) for row in rows], dtype=np.int32)
    mixture = mixture or Mixture((len(rows),), (1.0,))
    most_packs = None if train.max_steps is None else train.max_steps * train.num_packs

    def epochs() -> Iterator[PackTable]:
        for epoch in range(math.ceil(train.epochs)):
            order_M = mixture.epoch(epoch, train.seed)
            share = min(1.0, train.epochs - epoch)
            yield pack_table(lengths_N, train.pack_tokens, order_M[: max(1, round(len(order_M) * share))])

    packs = PackTable.joined(epochs(), most_packs)
    num_tokens = sum(
        int(lengths_N[packs.indices_N[begin : begin + _SUMMED_TOGETHER]].sum(dtype=np.int64))
        for begin in range(0, len(packs.indices_N), _SUMMED_TOGETHER)
    )
    return StepPlan(Steps(packs, train.num_packs), train.pack_tokens, num_tokens, num_tokens / (len(packs) * train.pack_tokens))
