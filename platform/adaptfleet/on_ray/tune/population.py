"""The members of a population as the driver sees them: their first settings, and Tune's scheduler that lets the worst take over from the
best."""

import itertools
import logging
import math
import random
from typing import Any

from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import Point, Range, Space, SweepJob
from adaptfleet.contracts.search_points import normalised, point_id, trial_name
from adaptfleet.on_ray.tune.lineage import Lineage
from adaptfleet.on_ray.tune.searcher import draw, drawn
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder

log = logging.getLogger(__name__)
# it tells each change in a dozen lines, of trials by their numbers
logging.getLogger(PopulationBasedTraining.__module__).setLevel(logging.WARNING)
_MAX_DRAWN, _MAX_EXPLORED = 10_000, 100


def unfinished_members(sweep: SweepJob, folder: SweepFolder) -> dict[int, Point]:
    """The settings that each member which has not finished begins or goes on with."""
    lineage, records = Lineage(folder), folder.records()
    firsts = first_points(sweep.space, _population(sweep))
    left = [n for n in range(len(firsts)) if f"member{n}" not in records or records[f"member{n}"].status == "failed"]
    return {number: next((leg.point for leg in lineage.of(number)[-1:]), firsts[number]) for number in left}


def first_points(space: Space, population: Population) -> list[Point]:
    """The baseline, and as many other points as there are members, all distinct."""
    found: dict[str, Point] = {}
    for point in itertools.islice(drawn(space, normalised(space, space.baseline), population.seed), _MAX_DRAWN):
        found.setdefault(point_id(point), point)
        if len(found) == population.size:
            break
    return list(found.values())


def meeting_step(folder: SweepFolder, members: list[int]) -> int:
    """The furthest step that a member of an interrupted population has come to or was on its way to."""
    lineage = Lineage(folder)
    return max((leg.ends for member in members for leg in lineage.of(member)[-1:]), default=0)


class PopulationScheduler(PopulationBasedTraining):
    """Ray's scheduler, in step: all members wait for each other at every interval, so that equal steps are compared, and what is taken over
    does not depend on who was quicker. Member 0 takes over nothing."""

    def __init__(self, sweep: SweepJob, barrier: int = 0) -> None:
        """`barrier`: the step at which members of an interrupted population meet first."""
        population = _population(sweep)
        generator = random.Random(population.seed)
        axes = sweep.space.axes
        super().__init__(
            time_attr="step",
            metric="eval_loss",
            mode="min",
            perturbation_interval=population.interval_steps,
            hyperparam_mutations={"point": {name: _mutation(axis, generator) for name, axis in axes.items()}},
            quantile_fraction=population.quantile,
            resample_probability=population.resample,
            perturbation_factors=population.factors,  # type: ignore[arg-type]  # typed as two, of which one is chosen
            custom_explore_fn=lambda config: {**config, "point": _inside(sweep.space, config["point"])},
            log_config=False,
            synch=True,
        )
        self._next_perturbation_sync = max(population.interval_steps, barrier)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("stage") == "finished":
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._without(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        if not trial.should_recover():
            self._without(tune_controller, trial)

    def _without(self, tune_controller: Any, gone: Any) -> None:
        """A member that ends while the others wait for it would be waited for until the end of time: Ray compares only when a result
        comes."""
        state = self._trial_state[gone]
        state.last_score, state.last_train_time = None, max(state.last_train_time, int(self._next_perturbation_sync))
        live = [trial for trial in tune_controller.get_live_trials() if trial is not gone and not trial.is_finished()]
        if live and all(self._trial_state[trial].last_train_time >= self._next_perturbation_sync for trial in live):
            waiting = self._trial_state[live[0]]
            super().on_trial_result(tune_controller, live[0], dict(waiting.last_result or {}))

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        if trial.config["member"] != 0:
            member = trial.config["member"]
            super()._exploit(tune_controller, trial, trial_to_clone)
            # all of the other one's configuration was taken, and who it is must not be
            trial.set_config({**trial.config, "member": member})
            log.info("%s goes on from %s, as %s", *map(trial_name, (trial.config, trial_to_clone.config)), point_id(trial.config["point"]))

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """With the very same settings the clone would only repeat what it was taken from."""
        for _ in range(_MAX_EXPLORED):
            found: tuple[dict[str, Any], dict[str, Any]] = super()._get_new_config(trial, trial_to_clone)
            if found[0]["point"] != trial_to_clone.config["point"]:
                break
        return found

    def _quantiles(self) -> tuple[list[Any], list[Any]]:
        """A member that diverged is no one's example."""
        lower, upper = super()._quantiles()
        alive = [trial for trial in upper if not math.isinf(self._trial_state[trial].last_score or 0.0)]
        return (lower, alive) if alive else ([], [])


def _population(sweep: SweepJob) -> Population:
    assert isinstance(sweep.algorithm, Population)
    return sweep.algorithm


def _mutation(axis: Any, generator: random.Random) -> Any:
    return (lambda: draw(axis, generator)) if isinstance(axis, Range) else sorted(axis.labels())


def _inside(space: Space, point: Point) -> Point:
    """Multiplied numbers of a range stay in it."""
    kept = dict(point)
    for name, axis in space.axes.items():
        value = kept[name]
        if isinstance(axis, Range) and isinstance(value, int | float):
            kept[name] = min(max(value, axis.low), axis.high)
    return kept
