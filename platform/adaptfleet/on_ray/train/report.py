"""The report of a run: `report.html` in its folder, made of what the folder holds and of the published manifest."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.core.evaluation.answers import score_answer
from adaptfleet.core.reports.charts import histogram, line_chart
from adaptfleet.core.reports.page import Section, charts, conversation, facts, folded, page, table, tiles
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.train.samples import Sample, read_samples

_CURVES = (
    ("loss", "training loss", True),
    ("learning_rate", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("tokens_per_s", "tokens per second", True),
)
"""Key, title, whether it is noisy."""
_TILES = (
    ("train_loss", "training loss"),
    ("eval_loss", "held-out loss"),
    ("eval_perplexity", "held-out perplexity"),
    ("exact_match", "exact match"),
    ("field_f1", "field F1"),
    ("valid_json", "valid JSON"),
    ("train_tokens_per_s", "tokens a second"),
    ("num_steps", "updates"),
)


def write_report(folder: RunFolder, job: FinetuneJob, metrics: Mapping[str, float], manifest: Manifest | None) -> Path:
    """Writes the page, whole or not at all, and returns its path."""
    file = folder.path / "report.html"
    unfinished = folder.path / f".report.html.{os.getpid()}"
    unfinished.write_text(report(folder, job, metrics, manifest), encoding="utf-8")
    unfinished.replace(file)
    return file


def report(folder: RunFolder, job: FinetuneJob, metrics: Mapping[str, float], manifest: Manifest | None) -> str:
    """The page. `manifest` is None where nothing was published."""
    found: dict[str, Any] = folder.read_json("facts.json") or {}
    made_at = manifest.created_at if manifest else datetime.now(UTC)
    subtitle = f"run {job.run_name()} · {job.method.kind} on {found['base']} · {made_at:%Y-%m-%d %H:%M} UTC"
    glance = [(what, f"{metrics[key]:.4g}") for key, what in _TILES if key in metrics]
    sections = [
        Section("Curves", _curves(folder)),
        Section("Held-out evaluations", _evaluations(folder)),
        Section("Held-out samples, before and after", "".join(map(_sample, read_samples(folder)))),
        Section("Data", _data_card(folder, job, found)),
        Section("Lineage", _lineage(manifest, found)),
        Section("Contract", folded("the resolved contract", yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))),
        Section("Library versions", facts([(name, version) for name, version in found["libraries"].items()])),
    ]
    return page(manifest.reference if manifest else job.run_name(), subtitle, tiles(glance), sections)


def _curves(folder: RunFolder) -> str:
    train, evaluated = folder.metrics("train"), folder.metrics("evaluation")
    drawn = [line_chart(title, [(line["step"], line[key]) for line in train if key in line], noisy) for key, title, noisy in _CURVES]
    drawn.append(line_chart("held-out loss", [(line["step"], line["eval_loss"]) for line in evaluated if "eval_loss" in line]))
    return charts(drawn)


def _evaluations(folder: RunFolder) -> str:
    lines = folder.metrics("evaluation")
    names = list(dict.fromkeys(key for line in lines for key in line if key not in ("kind", "step")))
    return table(
        ("step", *(name.replace("_", " ") for name in names)),
        [(f"{line['step']:g}", *(f"{line[name]:.4g}" if name in line else "" for name in names)) for line in lines],
    )


def _sample(sample: Sample) -> str:
    answers: list[tuple[str, str, bool | None]] = [("expected", sample.expected, None)]
    for name, text in (("before training", sample.before), ("after training", sample.after)):
        if text is not None:
            answers.append((name, text, score_answer(text, sample.expected).exact_match))
    return conversation([(turn["role"], turn["content"]) for turn in sample.prompt], answers)


def _data_card(folder: RunFolder, job: FinetuneJob, found: dict[str, Any]) -> str:
    train, test = folder.read_rows("train"), folder.read_rows("test")
    rows = [
        ("source", job.data.name()),
        ("training rows", f"{len(train):,}, {train.num_tokens:,} tokens, {train.num_labels:,} of them in the loss"),
        ("held-out rows", f"{len(test):,}, {test.num_tokens:,} tokens"),
        ("training rows equal to an earlier one", f"{found['num_duplicates']:,}"),
        ("tokens of the run", f"{found['num_tokens']:,} in {found['num_steps']:,} updates, packed rows {found['pack_fill']:.0%} full"),
        ("SHA-256 of the rows", found["data_sha256"]),
    ]
    lengths = [("training rows", train), ("held-out rows", test)]
    return facts(rows) + charts([histogram(f"lengths of {name}", part.lengths, "tokens") for name, part in lengths])


def _lineage(manifest: Manifest | None, found: dict[str, Any]) -> str:
    return facts(
        [
            ("published as", manifest.reference if manifest else "not published"),
            ("base", found["base"]),
            ("base revision", found["base_revision"]),
            *(("made from", parent) for parent in (manifest.parents if manifest else ())),
            ("contract fingerprint", found["fingerprint"]),
            *((f"SHA-256 of {path}", entry.sha256) for path, entry in sorted((manifest.files if manifest else {}).items())),
        ]
    )
