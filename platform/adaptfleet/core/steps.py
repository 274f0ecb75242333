"""Which packs each optimizer step takes: a plan of the whole run, the same for every number of workers."""

import math
from dataclasses import dataclass

from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import Pack, plan_packs
from adaptfleet.core.data.sample_order import epoch_order


@dataclass(frozen=True)
class StepPlan:
    steps: list[list[Pack]]
    """The packs of each optimizer step, over all workers."""
    pack_tokens: int
    num_tokens: int
    """Tokens of all steps, padding left out."""
    fill: float
    """Share of the packed positions that hold a token."""

    def share(self, step: int, rank: int, num_workers: int) -> list[Pack]:
        """A worker's packs of a step: every `num_workers`-th, so that each worker's load is alike."""
        return self.steps[step][rank::num_workers]


def plan_steps(rows: list[Encoded], train: TrainSpec) -> StepPlan:
    """Epoch after epoch in its seeded order, packed, cut into steps of `packs_per_step`. A last step may hold fewer packs."""
    lengths = [len(row.input_ids) for row in rows]
    packs: list[Pack] = []
    for epoch in range(math.ceil(train.epochs)):
        order = epoch_order(len(rows), train.seed, epoch)
        share = min(1.0, train.epochs - epoch)
        packs += plan_packs(lengths, train.pack_tokens, order[: max(1, round(len(order) * share))])
    steps = [packs[i : i + train.packs_per_step] for i in range(0, len(packs), train.packs_per_step)]
    if train.max_steps is not None:
        steps = steps[: train.max_steps]
    num_packs = sum(map(len, steps))
    num_tokens = sum(lengths[i] for step in steps for pack in step for i in pack.indices)
    return StepPlan(steps, train.pack_tokens, num_tokens, num_tokens / (num_packs * train.pack_tokens))
