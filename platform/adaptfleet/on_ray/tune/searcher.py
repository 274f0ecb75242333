"""Which point comes next: a listed one or Optuna's, never one that is known, and none beyond the budget."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import Grid, Optuna, Point, Random, Range, Space, SweepJob
from adaptfleet.contracts.search_points import grid, normalised, point_id
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder

_DEFAULT_TRIALS = 32
_STUDY = "sweep"
_PATIENCE = 10
"""Known points in a row, after which a search of a finite space gets the nearest unknown one: what it favours it has by then."""
_MAX_DUPLICATES = 300
"""In a row, after which there is nothing new."""


class _Source(Protocol):
    def next(self, trial_id: str) -> Point | None:
        """None: no more."""

    def tell(self, trial_id: str, metrics: dict[str, float] | None) -> None:
        """None: it was stopped or failed."""

    def prefer(self, point: Point) -> None:
        """Let it be the next."""


class PointSearcher(Searcher):
    """A Tune searcher over distinct points. Points with a record are not tried again; the source learns of them all the same."""

    def __init__(self, sweep: SweepJob, folder: SweepFolder) -> None:
        super().__init__()
        self._sweep, self._folder = sweep, folder
        self._source = _source(sweep, folder)
        self._live: dict[str, str] = {}
        records = folder.records()
        # one that failed is tried once more in each beginning: its cause may have been mended
        self._known = {name: record.metrics or None for name, record in records.items() if record.status != "failed"}
        self._tried = set(self._known)
        self._failed = {name for name, record in records.items() if record.status == "failed"}

    def suggest(self, trial_id: str) -> Any:
        if len(self._live) >= concurrency(self._sweep):
            return None
        if self._is_spent():
            return Searcher.FINISHED
        for number in range(_MAX_DUPLICATES):
            asked = f"{trial_id}-{number}"
            point = self._source.next(asked)
            if point is None:
                return Searcher.FINISHED
            name = point_id(point)
            if name in self._tried:
                self._source.tell(asked, self._known.get(name))
                if number >= _PATIENCE and self._sweep.space.is_finite:
                    nearest = self._nearest(point)
                    if nearest is None:
                        return Searcher.FINISHED
                    self._source.prefer(nearest)
                continue
            self._tried.add(name)
            self._live[trial_id] = asked
            return {"point": point}
        return Searcher.FINISHED

    def _nearest(self, point: Point) -> Point | None:
        """Of the points that are not known the one that differs in the fewest axes."""
        left = [other for other in grid(self._sweep.space) if point_id(other) not in self._tried]
        return min(left, key=lambda other: sum(other[axis] != point[axis] for axis in point), default=None)

    def _is_spent(self) -> bool:
        limits = self._sweep.limits
        trials = limits.trials or (None if isinstance(self._sweep.algorithm, Grid) else _DEFAULT_TRIALS)
        if trials is not None and len(self._tried) >= trials:
            return True
        return limits.train_tokens is not None and sum(cost.tokens for cost in self._folder.costs().values()) >= limits.train_tokens

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked = self._live.pop(trial_id, None)
        if asked is None:
            return
        record = self._folder.records().get(str((result or {}).get("point_id", "")))
        finished = record is not None and record.status == "finished"
        self._source.tell(asked, record.metrics if record and finished else None)

    def save(self, checkpoint_path: str) -> None:
        """An empty file: the sweep's folder holds all that is known."""
        Path(checkpoint_path).touch()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it was given, for restores that a sweep has no need of."""
        return {}

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep goes on from its folder")


def concurrency(sweep: SweepJob) -> int:
    """Trials at a time, by what the cluster has now."""
    if sweep.max_concurrent is not None:
        return sweep.max_concurrent
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) or resources.get("CPU", 1)))


def _source(sweep: SweepJob, folder: SweepFolder) -> _Source:
    first = normalised(sweep.space, sweep.space.baseline)
    match sweep.algorithm:
        case Grid():
            return _Listed(iter([first, *grid(sweep.space)]))
        case Random(seed=seed):
            return _Listed(drawn(sweep.space, first, seed))
        case Optuna() as algorithm:
            return _Optuna(sweep.space, algorithm, first, folder)
        case Population():
            raise AssertionError("a population's members are all there from the beginning")


class _Listed:
    def __init__(self, points: Iterator[Point]) -> None:
        self._points = points

    def next(self, trial_id: str) -> Point | None:
        return next(self._points, None)

    def tell(self, trial_id: str, metrics: dict[str, float] | None) -> None:
        pass

    def prefer(self, point: Point) -> None:
        self._points = itertools.chain([point], self._points)


def drawn(space: Space, first: Point, seed: int) -> Iterator[Point]:
    """The same points in the same order for a seed."""
    generator = random.Random(seed)
    yield first
    while True:
        yield normalised(space, {name: draw(axis, generator) for name, axis in space.axes.items()})


def draw(axis: Any, generator: random.Random) -> Any:
    if not isinstance(axis, Range):
        return generator.choice(axis.labels())
    if axis.log:
        value = axis.low * (axis.high / axis.low) ** generator.random()
        return round(value) if axis.is_whole else value
    return generator.randint(int(axis.low), int(axis.high)) if axis.is_whole else generator.uniform(axis.low, axis.high)


class _Optuna:
    """Ray's Optuna searcher, asked as often as needed. The baseline comes first, then points that an interrupted beginning had begun."""

    def __init__(self, space: Space, algorithm: Optuna, first: Point, folder: SweepFolder) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        goals = space.objectives
        sampler: Any = (
            optuna.samplers.NSGAIISampler(seed=algorithm.seed, population_size=8)
            if algorithm.sampler == "nsga2"
            else optuna.samplers.TPESampler(seed=algorithm.seed, multivariate=False, n_startup_trials=8)
        )
        earlier = [record.point for record in folder.records().values()]
        storage = optuna.storages.InMemoryStorage()
        self._search = OptunaSearch(
            study_name=_STUDY,
            storage=storage,
            space=self._define,
            metric=[goal.metric for goal in goals],
            mode=[goal.goal for goal in goals],
            sampler=sampler,
            points_to_evaluate=[self._asked(point) for point in (first, *earlier)],
        )
        self._study = optuna.load_study(study_name=_STUDY, storage=storage)

    def _define(self, trial: Any) -> None:
        """Define by run: an axis is asked for only where it applies."""
        chosen: Point = {}
        waiting = dict(self._space.axes)
        for name, axis in sorted(waiting.items(), key=lambda item: bool(item[1].when)):
            if any(chosen.get(other) not in labels for other, labels in axis.when.items()):
                continue
            if isinstance(axis, Range):
                suggest = trial.suggest_int if axis.is_whole else trial.suggest_float
                chosen[name] = suggest(name, axis.low, axis.high, log=axis.log)
            else:
                # Optuna's categories take no mixture of types well: the place stands for the value
                chosen[name] = axis.labels()[trial.suggest_categorical(f"{name}#", list(range(len(axis.labels()))))]

    def _asked(self, point: Point) -> dict[str, Any]:
        """A point as Optuna's parameters."""
        found: dict[str, Any] = {}
        for name, axis in self._space.axes.items():
            if isinstance(axis, Range):
                found[name] = point[name]
            elif point[name] in axis.labels():
                found[f"{name}#"] = axis.labels().index(point[name])
        return found

    def next(self, trial_id: str) -> Point | None:
        asked = self._search.suggest(trial_id) or {}
        chosen: Point = {}
        for name, axis in self._space.axes.items():
            place = asked.get(name if isinstance(axis, Range) else f"{name}#")
            chosen[name] = None if place is None else place if isinstance(axis, Range) else axis.labels()[place]
        return normalised(self._space, chosen)

    def tell(self, trial_id: str, metrics: dict[str, float] | None) -> None:
        self._search.on_trial_complete(trial_id, result=dict(metrics) if metrics else None, error=metrics is None)

    def prefer(self, point: Point) -> None:
        self._study.enqueue_trial(self._asked(point))
