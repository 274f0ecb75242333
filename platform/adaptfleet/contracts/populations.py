"""Population-based training as a sweep's algorithm, and what may be changed while a training goes on."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adaptfleet.contracts.base import Spec

if TYPE_CHECKING:
    from adaptfleet.contracts.search import Space, SweepJob

CHANGEABLE = (
    "train.learning_rate", "train.warmup_fraction", "train.weight_decay", "train.max_grad_norm", "method.dropout", "objective.alpha",
    "objective.temperature",
)  # fmt: skip
"""Settings that shape neither weights nor the plan of steps, and leave the held-out loss comparable: a checkpoint goes on with others."""


class Population(Spec):
    """Population-based training, arXiv 1711.09846: members train side by side. After each interval the worst of them take over weights,
    optimizer and step of the best, and go on with its settings a little changed. The first member is the baseline: others may take over
    from it, and it takes over nothing."""

    kind: Literal["population"] = "population"
    size: Annotated[int, Field(ge=2, le=16)] = 4
    """Members, the baseline among them."""
    interval_steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps between two comparisons."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the members that take over from as many of the best."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How probably a setting is drawn anew, instead of changed a little."""
    factors: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = (0.8, 1.25)
    """One of them multiplies a number of a range, which it does not leave; of listed values, in order, a neighbour is taken."""
    seed: int = 0
    """Of the members' first settings."""


def population_offenders(sweep: "SweepJob", population: Population) -> list[str]:
    """Everything that keeps a sweep from being trained as a population; empty: nothing does."""
    space, limits = sweep.space, sweep.limits
    if space.job not in ("finetune", "distill"):
        return [f"algorithm.kind is 'population', which trains, but the space is of {space.job} jobs; use a finetune or distill space"]
    wrong = _axis_offences(space)
    if [(goal.metric, goal.goal) for goal in space.objectives] != [("eval_loss", "min")]:
        shown = ", ".join(f"{goal.metric} ({goal.goal})" for goal in space.objectives)
        wrong.append(f"a population compares by eval_loss alone, but objectives has {shown}; use [{{metric: eval_loss}}]")
    if space.early_stopping.kind != "none":
        wrong.append(
            f"early_stopping.kind is {space.early_stopping.kind!r}, but members of a population take over from others instead of ending; "
            "leave it out"
        )
    if limits.trials is not None:
        wrong.append(f"budget.trials is {limits.trials}, but a population has algorithm.size ({population.size}) members; leave it out")
    if min(population.factors) <= 0 or set(population.factors) == {1.0}:
        wrong.append(f"algorithm.factors is {list(population.factors)}; use numbers above 0 that change something, such as [0.8, 1.25]")
    return wrong + _size_offences(sweep, space, population)


def _size_offences(sweep: "SweepJob", space: "Space", population: Population) -> list[str]:
    from adaptfleet.contracts.jobs import FinetuneJob
    from adaptfleet.contracts.search_points import job_of

    wrong = []
    if space.is_finite and space.grid_size < population.size:
        wrong.append(
            f"algorithm.size is {population.size}, but the axes have only {space.grid_size} points; use a smaller size, or a range of "
            "low and high"
        )
    job = job_of(sweep, space.baseline)
    assert isinstance(job, FinetuneJob)
    steps, limit = job.train.max_steps, sweep.limits.train_tokens
    if steps is not None and population.interval_steps >= steps:
        wrong.append(
            f"algorithm.interval_steps is {population.interval_steps}, but the training ends at step {steps} (train.max_steps), before "
            f"members are compared; use {max(1, steps // 4)} or so"
        )
    wanted = (steps or 0) * job.train.num_packs * job.train.pack_tokens * population.size
    if limit is not None and wanted > limit:
        wrong.append(
            f"budget.train_tokens is {limit:,}, but {population.size} members of {steps} steps may take {wanted:,}; raise the budget, or "
            "lower algorithm.size or train.max_steps"
        )
    return wrong


def _axis_offences(space: "Space") -> list[str]:
    wrong = []
    fixed = [f"axes.{name} ({axis.path})" for name, axis in space.axes.items() if axis.path not in CHANGEABLE]
    if fixed:
        wrong.append(
            f"{', '.join(fixed)} cannot change in the middle of a training; a population changes {', '.join(CHANGEABLE)}. Leave it out, or "
            "use algorithm.kind random or optuna"
        )
    for name, axis in space.axes.items():
        if axis.when or axis.without:
            wrong.append(f"axes.{name} has a condition, but every member of a population has every setting; leave out when and without")
        odd = [label for label in axis.labels() if type(label) not in (int, float)]
        if odd and axis.path in CHANGEABLE:
            wrong.append(f"axes.{name} has {', '.join(map(repr, odd))}; give numbers, or a range of low and high")
    return wrong
