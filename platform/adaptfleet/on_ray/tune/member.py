"""A member of a population: a Tune function that trains leg after leg, from its own last checkpoint or from the one that Tune's scheduler
gave it of a better member. It computes nothing itself."""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import tune

from adaptfleet.contracts.errors import DivergedError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import SweepJob
from adaptfleet.contracts.search_points import job_of
from adaptfleet.on_ray.compress.recipe_folder import next_key
from adaptfleet.on_ray.tune.computing import Place
from adaptfleet.on_ray.tune.lineage import Leg, Lineage, read_told, write_told
from adaptfleet.on_ray.tune.sweep_folder import Cost, StepLock, SweepFolder
from adaptfleet.on_ray.tune.trial import Trial, own_costs, shown, training, workers_cpu_s

_POLL_S = 0.2


def run_member(config: dict[str, Any]) -> None:
    """The Tune function. A failure is recorded and ends this member alone."""
    place: Place = config["place"]
    place.enter()
    folder = SweepFolder(Path(config["folder"]))
    sweep = SweepJob.model_validate_json((folder.path / "contract.json").read_text(), strict=False)
    trial = Trial(sweep, folder, place, config["point"], config["attempt"], config["member"])
    folder.begin(trial.id)
    try:
        with _told_checkpoint() as told:
            member = _Member(trial, config["member"], config["at_a_time"], told)
        for leg in member.legs(config["barrier"]):
            _report(trial, config["member"], leg)
        metrics, steps = member.result()
        trial.record("finished", metrics, steps=steps)
        tune.report({"point_id": trial.id, "stage": "finished", "step": member.last.ends, **metrics})
    except Exception as error:  # whatever it is, the other members are none the worse for it
        trial.record("failed", {}, shown(error))


def run_name(sweep: SweepJob, leg: str) -> str:
    """The run that trains a leg, by the leg's name."""
    return sweep.training_name(leg.partition("-")[2])


@contextlib.contextmanager
def _told_checkpoint() -> Iterator[tuple[int, str] | None]:
    """Whose leg to go on from, as the scheduler says. None: it says nothing yet in this beginning."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield read_told(Path(folder))


def _report(trial: Trial, member: int, leg: Leg) -> None:
    """Tells the scheduler. Where it lets the member wait or take over, the function ends here and is called again."""
    with tempfile.TemporaryDirectory(prefix="member-") as folder:
        write_told(Path(folder), member, leg)
        told = {"point_id": trial.id, "stage": f"step {leg.ends}", "step": leg.ends, "eval_loss": leg.eval_loss}
        tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))


class _Member:
    def __init__(self, trial: Trial, number: int, at_a_time: int, told: tuple[int, str] | None) -> None:
        assert isinstance(trial.sweep.algorithm, Population)
        self._trial, self._number, self._at_a_time = trial, number, at_a_time
        self._interval = trial.sweep.algorithm.interval_steps
        self._lineage = Lineage(trial.folder)
        self._legs = self._lineage.of(number)
        # one that was cut short is made again from what it began with
        pending = self._legs.pop() if self._legs and not self._legs[-1].is_done else None
        own = self._legs[-1] if self._legs else None
        self._head, self._taken_from = own, None
        self._untold = None
        """An own leg that the scheduler has not been told of: its process was killed first, or the whole sweep was."""
        if pending is not None:
            self._taken_from = pending.taken_from
            self._head = self._lineage.named(pending.before) if pending.before else None
        elif own is not None and (told is None or own.before == told[1]):
            self._untold = own
        elif told is not None and told[0] != number:
            self._taken_from, self._head = told[0], self._lineage.named(told[1])

    @property
    def last(self) -> Leg:
        """The one to go on from."""
        assert self._head is not None
        return self._head

    def legs(self, barrier: int) -> Iterator[Leg]:
        """Trains to the end, and gives each leg that others are to be compared with. `barrier`: the step at which members of an interrupted
        population meet again; who is there already tells its result, who is not trains up to it."""
        if self._untold is not None and self._untold.ends >= barrier and not self._untold.is_last:
            yield self._untold
        while self._head is None or not self._head.is_last:
            leg = self._trained(self._next())
            if not leg.is_last and leg.ends >= barrier:
                yield leg

    def result(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Metrics of the last leg, and the names of all that its weights went through. DivergedError: it has none."""
        if math.isinf(self.last.eval_loss or 0.0):
            raise DivergedError(self.last.reason)
        names = tuple(leg.name for leg in self._lineage.descent(self.last))
        metrics = json.loads((self._trial.folder.steps / names[-1] / "metrics.json").read_text())
        return metrics | own_costs(self._trial, list(names)), names

    def _next(self) -> Leg:
        head, point = self._head, self._trial.point
        begins = head.ends if head else 0
        before = head.name if head else None
        if head is not None and math.isinf(head.eval_loss or 0.0):
            # there is nothing to go on from until it takes over from another one
            return dataclasses.replace(head, begins=begins, ends=begins + self._interval)
        job = job_of(self._trial.sweep, point)
        name = f"segment-{next_key(before or '', job, until=str(begins + self._interval))}"
        return Leg(name, point, begins, begins + self._interval, before, self._taken_from)

    def _trained(self, leg: Leg) -> Leg:
        if leg.is_done:
            done = self._with_end(leg)
        else:
            self._lineage.write(self._number, [*self._legs, leg])
            done = self._train(leg)
        self._legs.append(done)
        self._lineage.write(self._number, self._legs)
        self._lineage.trim()
        self._head, self._taken_from = done, None
        return done

    def _train(self, leg: Leg) -> Leg:
        trial, run = self._trial, run_name(self._trial.sweep, leg.name)
        job = job_of(trial.sweep, leg.point)
        assert isinstance(job, FinetuneJob)
        # samples show what a whole run has changed
        evaluation = job.evaluation.model_copy(update={"max_sample_rows": 0})
        whole = job.model_copy(update={"run": run, "evaluation": evaluation})
        counted = job.train.model_copy(update={"max_steps": leg.ends - leg.begins})
        arguments = (*trial.common, leg.name, whole, leg.ends, leg.before)
        try:
            with self._slot():
                for _ in training(trial, leg.name, run, counted, "finetune_steps.train_segment", *arguments):
                    pass
        except DivergedError as error:
            trial.folder.add_cost(f"{leg.name}.ended-{trial.id}", Cost(workers_cpu_s(home() / "runs" / run), 0.0, 0, trial.id))
            return self._with_end(dataclasses.replace(leg, eval_loss=math.inf, reason=str(error)))
        metrics = json.loads((trial.folder.steps / leg.name / "metrics.json").read_text())
        return self._with_end(dataclasses.replace(leg, eval_loss=metrics["eval_loss"]))

    def _with_end(self, leg: Leg) -> Leg:
        """Its last step as the plan has it, which its run knows."""
        facts = json.loads((home() / "runs" / run_name(self._trial.sweep, leg.name) / "facts.json").read_text())
        ends = min(leg.ends, facts["num_steps"])
        return dataclasses.replace(leg, ends=ends, is_last=ends == facts["num_steps"])

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of as many places as trainings may run at a time; all members are there from the beginning."""
        locks: list[StepLock] = [self._trial.folder.lock(f"slot-{number}") for number in range(self._at_a_time)]
        while (held := next((lock for lock in locks if lock.try_acquire()), None)) is None:
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            held.release()
