"""What the tasks of a compression's trial do: plan it, make one step of it, measure a checkpoint. Each step is made once for all points."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never

from transformers import AutoConfig

from adaptfleet.contracts.compression import CompressJob, Merge, Prune, Publish, Quantize, Recover, Tune
from adaptfleet.contracts.errors import AdaptfleetError, ContractError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.search import Point, SweepJob
from adaptfleet.contracts.search_points import job_of, point_id
from adaptfleet.core.quantization.calibration import rows_sha256
from adaptfleet.core.quantization.fit import dense_bytes, planned_bytes, shapes_of
from adaptfleet.on_ray.compress import steps
from adaptfleet.on_ray.compress.preflight import Prepared, planned_shapes, prepare, recovery_data
from adaptfleet.on_ray.compress.proof import checkpoint_rows, weights_bytes
from adaptfleet.on_ray.compress.recipe_folder import made_once, next_key
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.tune.plan import Plan, PlannedStep
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder
from adaptfleet.store.registry import Registry


@functools.lru_cache(maxsize=2)
def prepared(sweep: str) -> Prepared:
    """Of the baseline: model, data and rows are every point's."""
    job = SweepJob.model_validate_json(sweep, strict=False)
    compression = job_of(job, job.space.baseline)
    assert isinstance(compression, CompressJob)
    return prepare(compression, Registry.open())


@functools.lru_cache(maxsize=2)
def prepared_whole(job: str) -> Prepared:
    """Of one point, with the rows that only its steps use."""
    return prepare(CompressJob.model_validate_json(job, strict=False), Registry.open())


def plan(sweep: str, folder: str, job: CompressJob) -> Plan:
    """ContractError: the architecture or the target forbids it."""
    found = prepared(sweep)
    config = AutoConfig.from_pretrained(found.folder, trust_remote_code=job.model.trust_remote_code)
    full = shapes_of(config, job.model.trust_remote_code)
    shapes = planned_shapes(job, config, full)
    quantize = job.step(Quantize)
    num_bytes = planned_bytes(shapes, quantize) if quantize else dense_bytes(shapes)
    planned: list[PlannedStep] = []
    key, checkpoint = found.revision, None
    rows = rows_sha256(found.calibration)
    for number, step in enumerate(job.steps):
        if isinstance(step, Publish) or (isinstance(step, Prune) and step.takes_nothing):
            continue
        run = None
        match step:
            case Prune():
                key = next_key(key, step, rows=rows)
            case Recover():
                key = next_key(key, step, data=recovery_data(job, step).fingerprint())
                run = SweepJob.model_validate_json(sweep, strict=False).training_name(key)
            case Merge():
                key = next_key(key, step)
            case Quantize():
                key = next_key(key, step, rows=rows, budget_of=str(found.parent_bytes))
            case Tune():
                key = next_key(key, step, rows=rows_sha256(prepared_whole(job.model_dump_json()).tuning), teacher=found.revision)
            case _:
                assert_never(step)
        planned.append(PlannedStep(f"{step.kind}-{key}", number, checkpoint, run))
        if not isinstance(step, Recover):
            checkpoint = planned[-1].name
    return Plan(planned, num_bytes, dense_bytes(shapes), dense_bytes(full))


def training(sweep: str, folder: str, job: CompressJob, step: PlannedStep, evaluations: int) -> FinetuneJob:
    """The recovery as a fine-tune of its own run, evaluated on the way."""
    recover = job.steps[step.number]
    assert isinstance(recover, Recover) and step.run
    finetune = steps.recovery_job(job, recover, checkpoint_folder(sweep, folder, step.before), step.run)
    evaluation = finetune.evaluation.model_copy(update={"times": evaluations, "max_loss_rows": job.proof.max_rows})
    return finetune.model_copy(update={"run": step.run, "evaluation": evaluation})


def checkpoint_folder(sweep: str, folder: str, name: str | None) -> Path:
    return SweepFolder(Path(folder)).steps / name if name else prepared(sweep).folder


def make(sweep: str, folder: str, job: CompressJob, step: PlannedStep, earlier: str | None, evaluations: int) -> int:
    """Makes a step's folder, and gives the tokens that were trained on. `earlier`: the step right before it."""
    found = prepared(sweep)
    spec = job.steps[step.number]
    kind, key = step.kind, step.key
    root = SweepFolder(Path(folder)).steps
    source = checkpoint_folder(sweep, folder, step.before)
    match spec:
        case Prune():
            made_once(kind, key, lambda out: steps.prune(source, out, spec, found.calibration), root)
        case Recover():
            return _train(sweep, folder, job, step, evaluations, root)
        case Merge():
            made_once(kind, key, lambda out: steps.merge(source, root / str(earlier), out), root)
        case Quantize():
            planned = _with_planned_shapes(found, job)
            made_once(kind, key, lambda out: steps.round_weights(source, out, spec, planned), root)
        case Tune():
            whole = prepared_whole(job.model_dump_json())
            made_once(kind, key, lambda out: steps.tune_scales(source, out, spec, whole), root)
        case _:
            raise AssertionError(spec)
    return 0


def _with_planned_shapes(found: Prepared, job: CompressJob) -> Prepared:
    config = AutoConfig.from_pretrained(found.folder, trust_remote_code=job.model.trust_remote_code)
    return dataclasses.replace(found, shapes=planned_shapes(job, config, shapes_of(config, job.model.trust_remote_code)))


def _train(sweep: str, folder: str, job: CompressJob, step: PlannedStep, evaluations: int, root: Path) -> int:
    finetune = training(sweep, folder, job, step, evaluations)
    kind, key = step.kind, step.key
    made_once(kind, key, lambda out: steps.recover(out, finetune), root)
    run = RunFolder(home() / "runs" / finetune.run_name())
    facts: dict[str, Any] = run.read_json("facts.json") or {}
    for checkpoint in run.path.glob("checkpoint_*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return int(facts.get("num_tokens", 0))


def quality(sweep: str, folder: str, job: CompressJob, name: str | None) -> dict[str, float]:
    """Held-out loss of a step's checkpoint, over the answers' tokens, and its bytes."""
    return _quality_of(sweep, job, name or "parent", checkpoint_folder(sweep, folder, name))


def quality_to_nearest(sweep: str, folder: str, job: CompressJob, step: PlannedStep) -> dict[str, float]:
    """The same of what a step would leave if it rounded to nearest. No weights stay."""
    spec = job.steps[step.number]
    assert isinstance(spec, Quantize)
    to_nearest = spec.to_nearest
    assert to_nearest is not None
    source = checkpoint_folder(sweep, folder, step.before)
    # found and removed after a kill by its name and number, as a step's own folder is
    with tempfile.TemporaryDirectory(prefix=f".{step.name}.", suffix=f".{os.getpid()}", dir=SweepFolder(Path(folder)).steps) as scratch:
        out = Path(scratch) / "rounded"
        out.mkdir()
        steps.round_weights(source, out, to_nearest, _with_planned_shapes(prepared(sweep), job))
        return _quality_of(sweep, job, f"nearest-{step.name}", out)


def _quality_of(sweep: str, job: CompressJob, name: str, checkpoint: Path) -> dict[str, float]:
    rows = checkpoint_rows(job, name, checkpoint, prepared(sweep).held_out["in_domain"])
    losses = [row.loss for row in rows if row.loss]
    nll = sum(loss.nats for loss in losses) / sum(loss.num_labels for loss in losses)
    return {"nll": nll, "bytes": float(weights_bytes(checkpoint))}


def check_all(sweep: SweepJob, points: Sequence[Point]) -> None:
    """Every point of a finite space against the model, before the first is made. ContractError lists those that cannot be."""
    text = sweep.model_dump_json()
    wrong: dict[str, str] = {}
    seen: set[str] = set()
    for point in points:
        job = job_of(sweep, point)
        assert isinstance(job, CompressJob)
        shape = json.dumps([step.model_dump(mode="json") for step in job.steps if isinstance(step, Prune | Quantize)])
        if shape in seen:
            continue
        seen.add(shape)
        try:
            plan(text, "", job)
        except AdaptfleetError as error:
            wrong.setdefault(str(error), point_id(point))
    if wrong:
        raise ContractError("the model does not take: " + "; ".join(f"{name}: {reason}" for reason, name in wrong.items()))
