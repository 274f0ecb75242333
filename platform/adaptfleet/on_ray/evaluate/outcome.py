"""What an evaluation found: metrics with intervals, differences of subjects, and the files and records that keep them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from adaptfleet.contracts.errors import StoreError
from adaptfleet.contracts.evaluating import EvaluateJob, EvaluationRecord, MetricEstimate
from adaptfleet.core.evaluation.intervals import Difference, confidence_interval, paired_difference
from adaptfleet.core.evaluation.row_scores import RowResult, metrics_of
from adaptfleet.on_ray.evaluate.local_models import Scores
from adaptfleet.on_ray.evaluate.rows import Rows
from adaptfleet.on_ray.evaluate.subjects import Resolved
from adaptfleet.store.registry import Registry

LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Scored:
    subject: Resolved
    scores: Scores


@dataclass(frozen=True)
class Comparison:
    first: str
    second: str
    differences: dict[str, Difference]
    """By metric: the second less the first."""


@dataclass(frozen=True)
class Outcome:
    job: EvaluateJob
    rows: Rows
    metrics: dict[str, dict[str, MetricEstimate]]
    """By subject and metric."""
    comparisons: list[Comparison]
    """Each further subject with the first."""
    notes: list[str]
    """What was left out, and why."""
    folder: Path
    evaluated_at: datetime

    def as_json(self) -> dict[str, Any]:
        return {
            "data": self.rows.origin,
            "rows_sha256": self.rows.sha256,
            "num_rows": len(self.rows.examples),
            "metrics": {label: {k: m.model_dump(mode="json") for k, m in found.items()} for label, found in self.metrics.items()},
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "notes": self.notes,
            "contract_fingerprint": self.job.fingerprint(),
            "libraries": libraries(),
            "evaluated_at": self.evaluated_at.isoformat(timespec="seconds"),
        }


def libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def make_outcome(job: EvaluateJob, rows: Rows, scored: Sequence[Scored], folder: Path) -> Outcome:
    measured = {one.subject.label: metrics_of(one.scores.rows) | one.scores.tasks for one in scored}
    metrics: dict[str, dict[str, MetricEstimate]] = {}
    for label, found in measured.items():
        metrics[label] = {}
        for name, metric in found.items():
            interval = confidence_interval(metric, job.num_resamples, job.seed)
            metrics[label][name] = MetricEstimate(value=interval.value, low=interval.low, high=interval.high, num_rows=metric.num_rows)
    comparisons: list[Comparison] = []
    notes: list[str] = []
    first = scored[0]
    for second in scored[1:]:
        if bool(first.scores.tasks) != bool(second.scores.tasks):
            notes.append(f"the tasks of lm-eval are not compared with {second.subject.label}: an endpoint cannot be measured on them")
        names = [name for name in measured[first.subject.label] if name in measured[second.subject.label]]
        if "perplexity" in names and _num_labels(first) != _num_labels(second):
            names.remove("perplexity")
            notes.append(
                f"the perplexities of {first.subject.label} and {second.subject.label} are not compared: their tokenizers cut the rows "
                f"into different tokens"
            )
        differences = {
            name: paired_difference(measured[first.subject.label][name], measured[second.subject.label][name], job.num_resamples, job.seed)
            for name in names
        }
        comparisons.append(Comparison(first.subject.label, second.subject.label, differences))
    return Outcome(job, rows, metrics, comparisons, notes, folder, datetime.now(UTC))


def write_outcome(outcome: Outcome, scored: Sequence[Scored]) -> None:
    """contract.json, rows.jsonl (a line for each row and subject) and results.json, which comes last. StoreError: no room."""
    folder = outcome.folder
    lines = [
        json.dumps({"row": i, "subject": one.subject.label, **_as_line(result)}, ensure_ascii=False)
        for one in scored
        for i, result in enumerate(one.scores.rows)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("contract.json", json.dumps(outcome.job.model_dump(mode="json"), indent=1)),
            ("rows.jsonl", "".join(line + "\n" for line in lines)),
            ("results.json", json.dumps(outcome.as_json(), indent=1)),
        ):
            unfinished = folder / f".{name}"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(folder / name)
    except OSError as error:
        raise StoreError(f"cannot write the results to {folder}: {error.strerror}. Free space there, or set ADAPTFLEET_HOME.") from None


def record_outcome(outcome: Outcome, scored: Sequence[Scored], registry: Registry) -> list[str]:
    """Adds a record beside each published version; the versions that got one."""
    recorded = []
    for one in scored:
        if one.subject.manifest is None:
            continue
        reference = one.subject.manifest.reference
        record = EvaluationRecord(
            reference=reference,
            data=outcome.rows.origin,
            rows_sha256=outcome.rows.sha256,
            num_rows=len(outcome.rows.examples),
            metrics=outcome.metrics[one.subject.label],
            contract_fingerprint=outcome.job.fingerprint(),
            run=outcome.folder.name,
            libraries=libraries(),
            evaluated_at=outcome.evaluated_at,
        )
        registry.add_evaluation(reference, record)
        recorded.append(reference)
    return recorded


def _num_labels(one: Scored) -> list[int]:
    return [result.loss.num_labels if result.loss else 0 for result in one.scores.rows]


def _as_line(result: RowResult) -> dict[str, Any]:
    example = result.example
    if example.text is not None:
        return {"text": example.text, "scores": result.scores()}
    prompt = [{"role": m.role, "content": m.content} for m in example.prompt]
    return {"prompt": prompt, "expected": example.answer, "answer": result.answer, "scores": result.scores()}
