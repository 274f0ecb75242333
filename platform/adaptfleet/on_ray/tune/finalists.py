"""The front of a sweep: chosen, measured in the engine, published, and told."""

import json
import logging
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from adaptfleet.contracts.artifacts import Draft, Manifest
from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import SweepJob
from adaptfleet.contracts.search_points import baseline_name, job_of
from adaptfleet.core.search.front import front, knee, thinned
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.tune.computing import Place, compute
from adaptfleet.on_ray.tune.lineage import Lineage, schedule
from adaptfleet.on_ray.tune.member import run_name
from adaptfleet.on_ray.tune.sweep import remove_steps
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder
from adaptfleet.on_ray.tune.trial import Trial, stages
from adaptfleet.store.registry import Registry

log = logging.getLogger(__name__)
LIBRARIES = ("ray", "torch", "transformers", "peft", "optuna", "safetensors")


@dataclass(frozen=True)
class Finalist:
    record: Record
    metrics: dict[str, float]
    """What was measured of it after the search."""
    reference: str | None
    """Published as. None: the baseline itself, or nothing is published."""
    fault: str = ""
    """Why the engine does not serve it; it is not published then."""


@dataclass(frozen=True)
class Settled:
    """All that the report tells."""

    records: list[Record]
    feasible: list[Record]
    """Finished, and within every constraint."""
    front: list[Record]
    finalists: list[Finalist]
    baseline: Record | None
    baseline_metrics: dict[str, float]
    noise: dict[str, float]
    """Of the engine's figures: by how much the baseline's second measurement differed from its first."""
    recommended: Record
    reason: str


def vector(sweep: SweepJob, record: Record) -> tuple[float, ...]:
    """The objectives, all to be minimised."""
    return tuple(record.metrics[o.metric] * (1 if o.goal == "min" else -1) for o in sweep.space.objectives)


def feasible(sweep: SweepJob, records: list[Record]) -> list[Record]:
    """Finished and within every constraint."""
    goals = [objective.metric for objective in sweep.space.objectives]
    return [
        record
        for record in records
        if record.status == "finished"
        and all(math.isfinite(record.metrics.get(goal, math.nan)) for goal in goals)
        and all(c.metric in record.metrics and c.holds(record.metrics[c.metric]) for c in sweep.space.constraints)
    ]


def settle(sweep: SweepJob, folder: SweepFolder, place: Place, registry: Registry) -> str:
    """Measures and publishes the front's finalists and writes `front.json` and the report. What to do next, in a line."""
    from adaptfleet.on_ray.tune.report import write_report

    records = list(folder.records().values())
    within = feasible(sweep, records)
    named = baseline_name(sweep)
    baseline = next((record for record in records if record.point_id == named and record.status == "finished"), None)
    if not within:
        limits = ", ".join(map(str, sweep.space.constraints))
        log.info("no point keeps the constraints (%s); see %s", limits, folder.path / "trials")
        return f"no point of sweep/{sweep.name} keeps the constraints ({limits})"
    vectors = [vector(sweep, record) for record in within]
    on_front = sorted((within[i] for i in front(vectors)), key=lambda record: vector(sweep, record)[-1])
    chosen = [on_front[i] for i in thinned([vector(sweep, r) for r in on_front], sweep.finalists.max)] if sweep.finalists.max else []
    recommended = on_front[knee([vector(sweep, record) for record in on_front])]
    if chosen and recommended not in chosen:
        chosen[-1] = recommended
    measured, faults = _measured(sweep, folder, place, chosen, baseline)
    finalists = []
    for record in chosen:
        found, fault = measured.get(record.point_id, {}), faults.get(record.point_id, "")
        finalists.append(Finalist(record, found, None if fault else _publish(sweep, folder, place, record, found, registry), fault))
    settled = Settled(
        records, within, on_front, finalists, baseline, measured.get("baseline", {}), _noise(measured), recommended,
        _reason(sweep, on_front, recommended, baseline),
    )  # fmt: skip
    if sweep.space.job == "compress":
        remove_steps(folder, {name for record in on_front for name in record.steps})
    if isinstance(sweep.algorithm, Population):
        Lineage(folder).trim(is_over=True)
    _write_front(sweep, folder, settled)
    log.info("report: %s", write_report(sweep, folder, settled))
    log.info("recommended: %s. %s", recommended.point_id, settled.reason)
    published = next((f.reference for f in finalists if f.record is recommended), None)
    return f"adaptfleet promote sweep/{sweep.name}#{recommended.point_id}" if published else recommended.point_id


def _measured(
    sweep: SweepJob, folder: SweepFolder, place: Place, chosen: list[Record], baseline: Record | None
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """By point, `baseline` and `baseline again` among them: each alone on its cores, one after the other, and kept. And what the engine
    does not serve, with the reason: the others are measured all the same."""
    if sweep.space.job != "compress" or not chosen:
        return {}, {}
    first = [("baseline", baseline)] if baseline else []
    last = [("baseline again", baseline)] if baseline else []
    found: dict[str, dict[str, float]] = {}
    faults: dict[str, str] = {}
    for name, record in [*first, *((record.point_id, record) for record in chosen), *last]:
        file = f"finalists/{name.replace(' ', '-')}.json"
        if folder.read_json(file) is None:
            log.info("measuring %s, alone", name)
            job = job_of(sweep, record.point)
            assert isinstance(job, CompressJob)
            checkpoint = _checkpoint(sweep, folder, record, place)
            common = (sweep.model_dump_json(), str(folder.path))
            try:
                metrics, _ = compute(place, "finalist_steps.measure", *common, job, checkpoint, alone=True)
            except ServingError as error:
                faults[name] = str(error)
                log.warning("%s is not served: %s", name, error)
                continue
            folder.write_json(file, metrics)
        found[name] = folder.read_json(file) or {}
    return found, faults


def _checkpoint(sweep: SweepJob, folder: SweepFolder, record: Record, place: Place) -> str | None:
    """The step that holds the point's weights; made again where an earlier settling has removed it."""
    made = [name for name in record.steps if name.partition("-")[0] in ("prune", "merge", "quantize", "tune")]
    if made and not (folder.steps / made[-1]).is_dir():
        for _ in stages(Trial(sweep, folder, place, record.point, record.attempt)):
            pass
    return made[-1] if made else None


def _noise(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    first, again = measured.get("baseline", {}), measured.get("baseline again", {})
    timed = [name for name in first if name.startswith(("decode", "time_to", "load"))]
    return {name: abs(again[name] / first[name] - 1) for name in timed if name in again and first[name]}


def _reason(sweep: SweepJob, on_front: list[Record], recommended: Record, baseline: Record | None) -> str:
    """Why this point, in a sentence."""
    goals = sweep.space.objectives
    parts = []
    for goal in goals:
        values = [record.metrics[goal.metric] for record in on_front]
        best = min(values) if goal.goal == "min" else max(values)
        mine = recommended.metrics[goal.metric]
        beside = f", {mine / baseline.metrics[goal.metric]:.3g} of the baseline's" if baseline and baseline.metrics[goal.metric] else ""
        parts.append(f"{goal.metric} {mine:.4g} (the best is {best:.4g}{beside})")
    if len(goals) == 1:
        return f"It has the best {goals[0].metric}: {parts[0]}."
    if len(on_front) == 1:
        return f"It beats every other point in everything: {' and '.join(parts)}."
    return f"Of {len(on_front)} points that none beats in everything it is nearest to the best of each: {' and '.join(parts)}."


def _publish(
    sweep: SweepJob, folder: SweepFolder, place: Place, record: Record, metrics: dict[str, float], registry: Registry
) -> str | None:
    """A version of the finalists' name; no alias moves. The same point is published once."""
    name = sweep.finalists.name or sweep.name
    job = job_of(sweep, record.point)
    if not isinstance(job, CompressJob | FinetuneJob):
        return None
    origin: dict[str, Any] = {"sweep": sweep.name, "point": record.point_id}
    found = {key: value for key, value in {**record.metrics, **metrics}.items() if math.isfinite(value)}
    fingerprint = job.fingerprint()
    run = sweep.training_name(fingerprint)
    if isinstance(sweep.algorithm, Population):
        # settings that changed on the way are no contract of a fine-tune: what was made is named by its last leg
        last = record.steps[-1]
        run, fingerprint = run_name(sweep, last), last.partition("-")[2]
        descent = Lineage(folder).descent(Lineage(folder).named(last))
        origin["schedule"] = [{"from_step": step, **point} for step, point in schedule(descent)]
    known = registry.find(fingerprint, name)
    if known is not None and (known.method or {}).get("sweep") == sweep.name:
        return known.reference
    libraries = {library: metadata.version(library) for library in LIBRARIES}
    if isinstance(job, CompressJob):
        checkpoint = _checkpoint(sweep, folder, record, place)
        if checkpoint is None:
            return None  # the parent itself, which needs no copy
        facts, _ = compute(place, "finalist_steps.base_facts", sweep.model_dump_json())
        draft = Draft(
            kind="model",
            name=name,
            method={"kind": "compression", "steps": [step.model_dump(mode="json") for step in job.steps], **origin},
            serves_adapters_of=facts["revision"] if job.takes_parents_adapters() else None,
            parents=(f"base:{facts['base']}:{facts['revision'][:16]}", f"data:{job.calibration.data.name()}:{facts['rows'][:16]}"),
            contract_fingerprint=fingerprint,
            metrics=found,
            libraries=libraries,
        )
        manifest = registry.publish(draft, folder.steps / checkpoint, alias=None)
    else:
        manifest = _publish_adapter(job, RunFolder(home() / "runs" / run), fingerprint, name, origin, found, libraries, registry)
    log.info("published %s: %s", manifest.reference, record.point_id)
    return manifest.reference


def _publish_adapter(
    job: FinetuneJob,
    run: RunFolder,
    fingerprint: str,
    name: str,
    origin: dict[str, Any],
    metrics: dict[str, float],
    libraries: dict[str, str],
    registry: Registry,
) -> Manifest:
    facts: dict[str, Any] = run.read_json("facts.json") or {}
    method = job.method.model_dump(mode="json")
    method["rank"] = json.loads((run.adapter / "adapter_config.json").read_text())["r"]
    draft = Draft(
        kind="adapter",
        name=name,
        base=facts["base"],
        base_revision=facts["base_revision"],
        method={**method, **origin},
        parents=(
            f"base:{facts['base']}:{facts['base_revision'][:16]}",
            *(f"data:{entry.source}:{facts['data_sha256'][:16]}" for entry in job.data.sources()),
        ),
        contract_fingerprint=fingerprint,
        metrics=metrics,
        libraries=libraries,
    )
    return registry.publish(draft, run.adapter, alias=None)


def _write_front(sweep: SweepJob, folder: SweepFolder, settled: Settled) -> Path:
    folder.write_json(
        "front.json",
        {
            "sweep": sweep.name,
            "objectives": [objective.model_dump() for objective in sweep.space.objectives],
            "recommended": settled.recommended.point_id,
            "reason": settled.reason,
            "front": [
                {
                    "point": record.point_id,
                    "metrics": record.metrics,
                    "published": next((f.reference for f in settled.finalists if f.record is record), None),
                    "measured": next((f.metrics for f in settled.finalists if f.record is record), {}),
                }
                for record in settled.front
            ],
            "baseline": settled.baseline_metrics or (settled.baseline.metrics if settled.baseline else {}),
            "noise": settled.noise,
            "points": {status: sum(r.status == status for r in settled.records) for status in ("finished", "stopped", "failed")},
            "search_s": max((record.search_s for record in settled.records), default=0.0),
            "cpu_s": sum(cost.cpu_s for cost in folder.costs().values()),
        },
    )
    return folder.path / "front.json"
