"""What `jobs/sweep.py` runs: a space of jobs, what makes one better than another, and how much may be spent on finding out."""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import read_yaml
from adaptfleet.contracts.names import SafeName, near
from adaptfleet.contracts.populations import Population, population_offenders
from adaptfleet.contracts.tracking import TrackingSpec

SPACES = Path(__file__).resolve().parents[3] / "tune_spaces"
Scalar = str | int | float | bool | None
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,32}$")]
AxisName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
SearchedJob = Literal["compress", "finetune", "distill", "serve"]

_ENGINE = (
    "time_to_first_token_s", "decode_tokens_per_s_b1", "decode_tokens_per_s_b16", "decode_tokens_per_cpu_s_b1",
    "decode_tokens_per_cpu_s_b16", "kv_cache_tokens", "memory_bytes", "load_s",
)  # fmt: skip
_COSTS = ("train_tokens", "cpu_s")
METRICS: dict[str, tuple[str, ...]] = {
    "compress": ("nll", "perplexity", "bytes", "bytes_ratio", *_COSTS, *_ENGINE),
    "finetune": ("eval_loss", "eval_perplexity", "exact_match", "field_f1", "valid_json", "bytes", *_COSTS),
    "distill": ("eval_loss", "eval_perplexity", "exact_match", "field_f1", "valid_json", "bytes", *_COSTS),
    "serve": ("time_to_first_token_s", "time_to_first_token_p95_s", "tokens_per_s", "request_p95_s", "kv_cache_tokens", "memory_bytes",
              "load_s", "cpu_s"),
}  # fmt: skip
"""What each kind of trial measures. `cpu_s`: of the trial's own chain of steps, whether they were shared or not."""
ENGINE_METRICS = frozenset(_ENGINE)
"""Named by an objective or a constraint of a compression, they make every trial load the engine, alone; else the finalists alone do."""


class Values(Spec):
    """Values as they stand in the job's contract. `null` leaves out what `without` names."""

    path: str
    values: Annotated[tuple[Scalar, ...], Field(strict=False, min_length=1)]
    without: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Paths that are left out of the job where the value is null or the axis does not apply."""
    when: dict[str, Annotated[tuple[Scalar, ...], Field(strict=False)]] = {}
    """The axis applies where each of these other axes has one of these values; elsewhere it is off."""

    def labels(self) -> list[Scalar]:
        return list(self.values)

    def value(self, label: Scalar) -> Any:
        return label


class Choices(Spec):
    """Parts of a contract, by a label of their own; a null one leaves out what `without` names."""

    path: str
    choices: Annotated[dict[Label, Any], Field(min_length=1)]
    without: Annotated[tuple[str, ...], Field(strict=False)] = ()
    when: dict[str, Annotated[tuple[Scalar, ...], Field(strict=False)]] = {}

    def labels(self) -> list[Scalar]:
        return list(self.choices)

    def value(self, label: Scalar) -> Any:
        return self.choices[str(label)]


class Range(Spec):
    """Numbers from `low` to `high`; whole ones where both are. Not for grids."""

    path: str
    low: float | int
    high: float | int
    log: bool = False
    """Spread evenly over the logarithm."""
    without: Annotated[tuple[str, ...], Field(strict=False)] = ()
    when: dict[str, Annotated[tuple[Scalar, ...], Field(strict=False)]] = {}

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}, not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log is true, but low is {self.low}; a logarithm needs numbers above 0")
        return self

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def labels(self) -> list[Scalar]:
        """Its ends, which stand for it where single values are checked."""
        return [self.low, self.high]

    def value(self, label: Scalar) -> Any:
        return label


def _axis_kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields
    return "choices" if "choices" in keys else "range" if "low" in keys or "high" in keys else "values"


Axis = Annotated[
    Annotated[Values, Tag("values")] | Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")], Discriminator(_axis_kind)
]
Point = dict[str, Scalar]
"""A label for each axis; None where it does not apply."""


class Objective(Spec):
    metric: str
    goal: Literal["min", "max"] = "min"


class Constraint(Spec):
    """A point that breaks it is shown, but stands on no front."""

    metric: str
    at_most: float | int | None = None
    at_least: float | int | None = None

    @model_validator(mode="after")
    def _one_end(self) -> "Constraint":
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"give one of at_most and at_least for {self.metric}")
        return self

    def holds(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0)

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most is not None else '>='} {self.at_most if self.at_most is not None else self.at_least:g}"


class Budget(Spec):
    """Hard: nothing is begun beyond it, and what runs when time is up is ended."""

    trials: Annotated[int, Field(ge=1)] | None = None
    """Distinct points; None: all of a grid, 32 of another search."""
    train_tokens: Annotated[int, Field(ge=1)] | None = None
    cpu_hours: Annotated[float, Field(gt=0)] | None = None
    """CPUs of the cluster by the time of the search."""
    wall_s: Annotated[float, Field(gt=0)] | None = None
    """Time of the search; finalists are measured after it."""


class NoStopping(Spec):
    kind: Literal["none"] = "none"


class Dominance(Spec):
    """A trial ends as soon as another one with the same last step is ahead of it in every objective by the margin: after each evaluation of
    its training, and before it is rounded. Sizes are known beforehand."""

    kind: Literal["dominance"] = "dominance"
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of its loss by which a trial must be worse."""
    evaluations: Annotated[int, Field(ge=1, le=20)] = 3
    """Of a training, the last at its end."""


class Asha(Spec):
    """Asynchronous successive halving, arXiv 1810.05934. For one objective."""

    kind: Literal["asha"] = "asha"
    evaluations: Annotated[int, Field(ge=2, le=50)] = 4
    reduction_factor: Annotated[float, Field(gt=1)] = 2.0


class Median(Spec):
    """A trial ends when its best loss is worse than the median of the others' means so far. For one objective."""

    kind: Literal["median"] = "median"
    evaluations: Annotated[int, Field(ge=2, le=50)] = 4


EarlyStopping = Annotated[NoStopping | Dominance | Asha | Median, Field(discriminator="kind")]


class Space(Spec):
    job: SearchedJob
    """The contract that is searched: of `jobs/compress.py`, `jobs/finetune.py`, `jobs/distill.py`, or what the endpoint serves."""
    base: dict[str, Any]
    """The contract with every axis on, without what is published. Axes change values of it."""
    axes: Annotated[dict[AxisName, Axis], Field(min_length=1)]
    baseline: Point
    """The point that all others are compared with, measured first and once: nothing taken away, nothing rounded, no adapter."""
    objectives: Annotated[tuple[Objective, ...], Field(strict=False, min_length=1, max_length=3)]
    constraints: Annotated[tuple[Constraint, ...], Field(strict=False)] = ()
    early_stopping: EarlyStopping = NoStopping()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _metrics_are_measured(self) -> "Space":
        known = METRICS[self.job]
        wrong = [
            f"{kind} names {item.metric!r}, which a trial of {self.job} does not measure.{near(item.metric, known)} It measures "
            f"{', '.join(known)}"
            for kind, items in (("objectives", self.objectives), ("constraints", self.constraints))
            for item in items
            if item.metric not in known
        ]
        names = [objective.metric for objective in self.objectives]
        wrong += [f"objectives names {name} twice" for name in sorted({n for n in names if names.count(n) > 1})]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @model_validator(mode="after")
    def _stopping_fits(self) -> "Space":
        kind = self.early_stopping.kind
        if kind in ("asha", "median") and len(self.objectives) > 1:
            raise ValueError(f"early_stopping.kind {kind!r} ranks by one objective, but there are {len(self.objectives)}; use dominance")
        if kind in ("asha", "median") and (self.job not in ("finetune", "distill") or self.objectives[0].metric != "eval_loss"):
            raise ValueError(f"early_stopping.kind {kind!r} follows the eval_loss of a fine-tune or a distillation; use dominance or none")
        if kind == "dominance" and (self.job != "compress" or {o.metric for o in self.objectives} != {"nll", "bytes"}):
            raise ValueError("early_stopping.kind 'dominance' is for compressions with the objectives nll and bytes; use none")
        return self

    @model_validator(mode="after")
    def _conditions_name_axes(self) -> "Space":
        wrong: list[str] = []
        for name, axis in self.axes.items():
            for other, labels in axis.when.items():
                if other == name or other not in self.axes:
                    wrong.append(f"axes.{name}.when names {other!r}, no other axis.{near(other, set(self.axes) - {name})}")
                elif self.axes[other].when:
                    wrong.append(f"axes.{name}.when names {other!r}, which has a condition itself")
                elif not isinstance(self.axes[other], Range):
                    odd = [label for label in labels if label not in self.axes[other].labels()]
                    wrong += [f"axes.{name}.when: {other} is never {label!r}" for label in odd]
        missing = sorted(set(self.axes) - set(self.baseline))
        unknown = sorted(set(self.baseline) - set(self.axes))
        wrong += [f"baseline gives no value of the axis {name!r}" for name in missing]
        wrong += [f"baseline names {name!r}, no axis.{near(name, self.axes)}" for name in unknown]
        for name in set(self.axes) & set(self.baseline):
            axis, label = self.axes[name], self.baseline[name]
            inside = (
                isinstance(label, (int, float)) and axis.low <= label <= axis.high if isinstance(axis, Range) else label in axis.labels()
            )
            if not inside and not (label is None and axis.when):
                wrong.append(f"baseline has {name} {label!r}, which the axis does not; add it, for 'leave it alone' must be able to win")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def is_finite(self) -> bool:
        return not any(isinstance(axis, Range) for axis in self.axes.values())

    @property
    def grid_size(self) -> int:
        """Of a finite space, conditions left aside."""
        return math.prod(len(axis.labels()) for axis in self.axes.values())


class Grid(Spec):
    """Every point of a space without ranges."""

    kind: Literal["grid"] = "grid"


class Random(Spec):
    kind: Literal["random"] = "random"
    seed: int = 0


class Optuna(Spec):
    kind: Literal["optuna"] = "optuna"
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """`tpe`: a tree-structured Parzen estimator, of several objectives too, arXiv 2304.11127; `nsga2`: an evolutionary search."""
    seed: int = 0


Algorithm = Annotated[Grid | Random | Optuna | Population, Field(discriminator="kind")]


class FinalistsSpec(Spec):
    max: Annotated[int, Field(ge=0, le=64)] = 6
    """Points of the front that are measured in the engine and published: both ends, and of the others those that add most to it."""
    name: SafeName | None = None
    """The registry's name for them, a version each; no alias is moved. None: the sweep's name."""
    out_of_domain: bool = True
    """Measure them, where the base names such rows, on a task that the search did not see."""


class SweepJob(Spec):
    job: Literal["sweep"] = "sweep"
    name: SafeName
    """`adaptfleet promote sweep/NAME#POINT` promotes what is found."""
    space: Space
    """A file's name in `tune_spaces/`, a path, or the space itself."""
    over: dict[str, Any] = {}
    """Laid over the space's base: `--set over.model.source=my-base`."""
    algorithm: Algorithm = Grid()
    budget: Budget | None = None
    """None: the space's own."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time. None: as many as the cluster has CPUs, or GPUs where it has any, and more as it grows."""
    finalists: FinalistsSpec = FinalistsSpec()
    tracking: TrackingSpec = TrackingSpec()
    """Where the trials are shown, each with its point and its metrics. What a training shows of its steps is `base.tracking`'s."""

    @model_validator(mode="before")
    @classmethod
    def _space_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("space"), str):
            return {**values, "space": _space_in(values["space"])}
        return values

    @model_validator(mode="after")
    def _trackers_show_trials(self) -> "SweepJob":
        if self.tracking.wandb is not None:
            raise ValueError(
                "tracking.wandb is set, but a sweep's trials are shown in tensorboard and mlflow; leave it out, or give it to the "
                "trainings: over.tracking.wandb"
            )
        return self

    @model_validator(mode="after")
    def _points_make_jobs(self) -> "SweepJob":
        from adaptfleet.contracts.search_points import check_points

        if isinstance(self.algorithm, Grid) and not self.space.is_finite:
            ranges = ", ".join(name for name, axis in self.space.axes.items() if isinstance(axis, Range))
            raise ValueError(f"algorithm.kind is 'grid', but {ranges} is a range; use random or optuna, or give values")
        try:
            check_points(self)
        except ContractError as error:
            raise ValueError(str(error)) from None
        if isinstance(self.algorithm, Population) and (wrong := population_offenders(self, self.algorithm)):
            raise ValueError("; ".join(wrong))
        return self

    @property
    def limits(self) -> Budget:
        return self.budget or self.space.budget

    def run_name(self) -> str:
        """The folder of the sweep. A larger budget, more finalists or more trials at a time go on in the same one."""
        same = self.model_dump(mode="json", include={"name", "over", "algorithm"})
        same["space"] = self.space.model_dump(mode="json", exclude={"budget"})
        canonical = json.dumps(same, sort_keys=True, separators=(",", ":"))
        return f"sweep-{self.name[:40]}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"

    def training_name(self, key: str) -> str:
        """The run of a training that the sweep makes; `key` is its step's hash or its contract's."""
        return f"sweep-{self.run_name()[-16:]}-{key}"


def _space_in(name: str) -> dict[str, Any]:
    """The values of a space's file. ValueError names what is there."""
    file = Path(name).expanduser()
    if "/" not in name and not file.is_file():
        file = SPACES / f"{name.removesuffix('.yaml')}.yaml"
    try:
        values = read_yaml(file)
    except ContractError as error:
        known = sorted(path.stem for path in SPACES.glob("*.yaml"))
        raise ValueError(f"{error}{near(name, known)} Shipped are {', '.join(known) or 'none'}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no mapping of keys to values")
    return values
