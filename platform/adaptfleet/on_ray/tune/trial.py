"""One trial: a Tune function that takes a point through its steps and tells Tune how it stands after each. It computes nothing itself."""

import contextlib
import json
import math
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from adaptfleet.contracts.compression import CompressJob, Quantize, Recover
from adaptfleet.contracts.errors import AdaptfleetError, ContractError, DivergedError, TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob, TrainSpec
from adaptfleet.contracts.search import ENGINE_METRICS, Dominance, Point, SweepJob
from adaptfleet.contracts.search_points import job_of, trial_name
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.tune.computing import Place, compute, finished, submit
from adaptfleet.on_ray.tune.plan import TO_NEAREST, Plan
from adaptfleet.on_ray.tune.sweep_folder import Cost, Record, SweepFolder

_POLL_S = 0.5
Report = dict[str, Any]
"""`stage`, and what is known by then: `nll` and `bytes` (before the last one: bounds from below), `eval_loss`, `evaluation`."""


@dataclass(frozen=True)
class Trial:
    """What one trial has at hand."""

    sweep: SweepJob
    folder: SweepFolder
    place: Place
    point: Point
    attempt: int
    member: int | None = None
    """Its number, where it is of a population."""

    @property
    def id(self) -> str:
        return trial_name({"point": self.point, "member": self.member})

    @property
    def common(self) -> tuple[str, str]:
        """What the tasks of every trial are given."""
        return self.sweep.model_dump_json(), str(self.folder.path)

    @property
    def evaluations(self) -> int:
        return int(getattr(self.sweep.space.early_stopping, "evaluations", 1))

    def measured(self, name: str, function: str, *arguments: Any, alone: bool = False) -> dict[str, float]:
        """Numbers that are found once, by one of the trials that want them; the others wait."""
        file = f"quality/{name}.json"
        if self.folder.read_json(file) is None:
            with self.folder.lock(name):
                if self.folder.read_json(file) is None:
                    with self.failing_once(name):
                        found, cost = compute(self.place, function, *arguments, alone=alone)
                    self.folder.add_cost(name, Cost(cost.cpu_s, cost.wall_s, 0, self.id))
                    self.folder.write_json(file, found)
        return dict(self.folder.read_json(file) or {})

    def made(self, name: str, function: str, *arguments: Any) -> None:
        """A step's folder, made once in the same way."""
        target = self.folder.steps / name
        if not target.is_dir():
            with self.folder.lock(name):
                if not target.is_dir():
                    with self.failing_once(name):
                        _, cost = compute(self.place, function, *arguments)
                    self.folder.add_cost(name, Cost(cost.cpu_s, cost.wall_s, 0, self.id))

    @contextmanager
    def failing_once(self, step: str) -> Iterator[None]:
        """What failed for one point fails for all that share it, at once: it is tried again in the next beginning."""
        file = f"failures/{step}.{self.attempt}.json"
        if (known := self.folder.read_json(file)) is not None:
            kind = DivergedError if known["diverged"] else TrainingError
            raise kind(f"{step} failed for another point: {known['reason']}")
        try:
            yield
        except Exception as error:
            self.folder.write_json(file, {"reason": str(error)[-2000:], "diverged": isinstance(error, DivergedError)})
            raise

    def record(self, status: Any, metrics: dict[str, float], reason: str = "", steps: tuple[str, ...] = ()) -> None:
        self.folder.record(
            Record(self.id, self.point, status, metrics, reason, list(steps), self.attempt, time.time(), self.folder.search_s())
        )


def run_trial(config: dict[str, Any]) -> None:
    """The Tune function. A failure is recorded and ends this trial alone."""
    place: Place = config["place"]
    place.enter()
    folder = SweepFolder(Path(config["folder"]))
    sweep = SweepJob.model_validate_json((folder.path / "contract.json").read_text(), strict=False)
    trial = Trial(sweep, folder, place, config["point"], config["attempt"])
    folder.begin(trial.id)
    try:
        # closed where Tune ends the trial at a report: a training of its own ends with it
        with contextlib.closing(stages(trial)) as reports:
            for report in reports:
                if report["stage"] == "finished":
                    trial.record("finished", report["metrics"], steps=report["steps"])
                    report |= report["metrics"]
                tune.report({"point_id": trial.id, **{key: value for key, value in report.items() if key not in ("metrics", "steps")}})
    except Exception as error:  # whatever it is, the other points are none the worse for it
        trial.record("failed", {}, shown(error))


def shown(error: Exception) -> str:
    told = str(error) if isinstance(error, AdaptfleetError) else "".join(traceback.format_exception_only(error)).strip()
    return told[-2000:]


def stages(trial: Trial) -> Generator[Report]:
    """The last one is `finished`, with the metrics and the names of all steps."""
    job = job_of(trial.sweep, trial.point)
    match job:
        case CompressJob():
            yield from _compression(trial, job)
        case FinetuneJob():
            yield from _finetune(trial, job)
        case ServingSpec():
            yield from _serving(trial, job)
        case _:
            raise AssertionError(job)


def _compression(trial: Trial, job: CompressJob) -> Iterator[Report]:
    plan: Plan = compute(trial.place, "compress_steps.plan", *trial.common, job)[0]
    rounding = next((step.model_dump_json() for step in job.steps if isinstance(step, Quantize)), "none")
    known = {"bytes": float(plan.num_bytes), "dense_bytes": float(plan.dense_bytes), "rounding": rounding}
    checkpoint: str | None = None
    earlier: str | None = None
    for step in plan.steps:
        spec = job.steps[step.number]
        if isinstance(spec, Quantize):
            # rounding makes no loss smaller: what it is by now is a bound
            bound = trial.measured(_quality(checkpoint), "compress_steps.quality", *trial.common, job, checkpoint)
            yield {"stage": "unrounded", "nll": bound["nll"], **known}
            if isinstance(trial.sweep.space.early_stopping, Dominance) and spec.to_nearest:
                near = trial.measured(f"nearest-{step.name}", "compress_steps.quality_to_nearest", *trial.common, job, step)
                yield {"stage": TO_NEAREST, "nll": near["nll"], **known, "rounding": spec.to_nearest.model_dump_json()}
        work = ("compress_steps.make", *trial.common, job, step, earlier, trial.evaluations)
        if isinstance(spec, Recover):
            for report in training(trial, step.name, str(step.run), spec.train, *work):
                yield {**report, **known}
        else:
            trial.made(step.name, *work)
            checkpoint = step.name
        earlier = step.name
    names = [*(step.name for step in plan.steps), _quality(checkpoint)]
    if rounding == "none":
        bound = trial.measured(_quality(checkpoint), "compress_steps.quality", *trial.common, job, checkpoint)
        yield {"stage": "unrounded", "nll": bound["nll"], **known}
    metrics = trial.measured(_quality(checkpoint), "compress_steps.quality", *trial.common, job, checkpoint)
    metrics |= {"perplexity": math.exp(metrics["nll"]), "bytes_ratio": metrics["bytes"] / plan.parent_bytes}
    space = trial.sweep.space
    if {*(o.metric for o in space.objectives), *(c.metric for c in space.constraints)} & ENGINE_METRICS:
        names.append(f"engine-{checkpoint or 'parent'}")
        metrics |= trial.measured(names[-1], "engine_trials.checkpoint_in_engine", *trial.common, job, checkpoint, alone=True)
    yield {"stage": "finished", "metrics": metrics | own_costs(trial, names), "steps": tuple(names), "rounding": rounding}


def _quality(checkpoint: str | None) -> str:
    return f"quality-{checkpoint or 'parent'}"


def _finetune(trial: Trial, job: FinetuneJob) -> Iterator[Report]:
    name = f"train-{job.fingerprint()}"
    evaluation = job.evaluation.model_copy(update={"times": max(trial.evaluations, job.evaluation.times)})
    run = trial.sweep.training_name(job.fingerprint())
    whole = job.model_copy(update={"run": run, "evaluation": evaluation})
    last: Report = {}
    for report in training(trial, name, run, job.train, "finetune_steps.train", *trial.common, name, whole):
        last = report
        yield report
    metrics = json.loads((trial.folder.steps / name / "metrics.json").read_text())
    yield {**last, "stage": "finished", "metrics": metrics | own_costs(trial, [name]), "steps": (name,)}


def _serving(trial: Trial, spec: ServingSpec) -> Iterator[Report]:
    name = f"engine-{spec.fingerprint()}"
    metrics = trial.measured(name, "engine_trials.under_load", *trial.common, spec, alone=True)
    yield {"stage": "finished", "metrics": metrics | own_costs(trial, [name]), "steps": (name,)}


def training(trial: Trial, name: str, run: str, train: TrainSpec, function: str, *arguments: Any) -> Iterator[Report]:
    """The evaluations of a training, whichever trial does it: the first that gets the lock trains, the others look on. One that is ended
    early can be taken up from its last checkpoint."""
    target, lock, ref = trial.folder.steps / name, trial.folder.lock(name), None
    path, told = home() / "runs" / run, 0
    try:
        while not target.exists():
            for report in _evaluations(path, told, trial.evaluations):
                told += 1
                yield report
            if ref is None and not target.exists() and lock.try_acquire():
                if target.exists():
                    break
                _check_tokens(trial, train)
                with trial.failing_once(name):
                    ref = submit(trial.place, function, *arguments, waits=True)
            if ref is not None and ray.wait([ref], timeout=0)[0]:
                break
            time.sleep(_POLL_S)
        if ref is not None:
            # its folder is there a little before the task has ended
            done, ref = ref, None
            with trial.failing_once(name):
                tokens, cost = finished(done)
            trial.folder.add_cost(name, Cost(cost.cpu_s + workers_cpu_s(path), cost.wall_s, tokens, trial.id))
    finally:
        if ref is not None:
            # the task's process owns the training's workers, which end with it
            ray.cancel(ref, force=True)
            trial.folder.add_cost(f"{name}.ended-{trial.id}"[:200], Cost(workers_cpu_s(path), 0.0, 0, trial.id))
        lock.release()
    yield from _evaluations(path, told, trial.evaluations)


def _check_tokens(trial: Trial, train: TrainSpec) -> None:
    """ContractError where a training would go beyond the budget. One without `max_steps` counts when it is done."""
    limit = trial.sweep.limits.train_tokens
    spent = sum(cost.tokens for cost in trial.folder.costs().values())
    wanted = (train.max_steps or 0) * train.num_packs * train.pack_tokens
    if limit is not None and spent + wanted > limit:
        raise ContractError(
            f"budget.train_tokens is {limit:,}, of which {spent:,} are spent; this training may take {wanted:,} more. Raise the budget."
        )


def workers_cpu_s(run: Path) -> float:
    """CPU time of the training's workers, as the first of them tells."""
    file = run / "progress.json"
    return float(json.loads(file.read_text()).get("cpu_s", 0.0)) if file.is_file() else 0.0


def _evaluations(run: Path, told: int, expected: int) -> Iterator[Report]:
    file = run / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:  # it is being written
            continue
        if values.get("kind") == "evaluation" and "eval_loss" in values:
            found.append(values)
    for number, values in list(enumerate(found, 1))[told:]:
        yield {"stage": f"training {number}/{expected}", "evaluation": number, "eval_loss": values["eval_loss"]}


def own_costs(trial: Trial, names: list[str]) -> dict[str, float]:
    """What the point's steps cost, whoever made them."""
    costs = trial.folder.costs()
    mine = [costs[name] for name in names if name in costs]
    return {"cpu_s": sum(cost.cpu_s for cost in mine), "train_tokens": float(sum(cost.tokens for cost in mine))}
