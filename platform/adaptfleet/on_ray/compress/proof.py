"""What is measured of the parent and of the result, in one run: bytes, quality on held-out rows, and the real engine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.evaluating import BaseSubject, EvaluateJob
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.data.encoding import Encoded, encode_all
from adaptfleet.core.data.examples import Example
from adaptfleet.core.evaluation.intervals import Interval, Ratio, confidence_interval
from adaptfleet.core.evaluation.row_scores import RowResult, metrics_of
from adaptfleet.core.models.device import device, model_dtype
from adaptfleet.on_ray.compress.engine_proof import BATCHES, EngineProof, engine_proof, longest
from adaptfleet.on_ray.compress.preflight import Prepared
from adaptfleet.on_ray.evaluate.local_models import score_local_model
from adaptfleet.on_ray.evaluate.progress import ProgressLine
from adaptfleet.on_ray.evaluate.subjects import LocalModel

_PARITY_ROWS = 12


@dataclass(frozen=True)
class Measured:
    """One checkpoint."""

    num_bytes: int
    """Of its weights on disk."""
    quality: dict[str, dict[str, Interval]]
    """By domain and metric."""
    engine: EngineProof | None
    parity: float | None
    """Perplexity that the engine computes over the one that transformers does, on the same rows."""


@dataclass(frozen=True)
class Proof:
    parent: Measured
    result: Measured
    perplexity_ratio: dict[str, Interval]
    """By domain: the result's over the parent's, drawn in pairs."""
    recovered: dict[str, Interval]
    """The same of the result with the adapter of its recovery on; empty where there is none."""
    adapters: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """By adapter of the parent and domain: the perplexity with it on the result over that with it on the parent."""

    def metrics(self) -> dict[str, float]:
        """Flat, for the manifest."""
        found: dict[str, float] = {
            "bytes": float(self.result.num_bytes),
            "bytes_ratio": self.result.num_bytes / self.parent.num_bytes,
        }
        for domain, metrics in self.result.quality.items():
            for name, interval in metrics.items():
                found |= {f"{name}_{domain}": interval.value, f"{name}_{domain}_low": interval.low, f"{name}_{domain}_high": interval.high}
                if name != "perplexity":
                    found[f"{name}_{domain}_parent"] = self.parent.quality[domain][name].value
        for domain, ratio in self.perplexity_ratio.items():
            found |= {
                f"perplexity_ratio_{domain}": ratio.value,
                f"perplexity_ratio_{domain}_low": ratio.low,
                f"perplexity_ratio_{domain}_high": ratio.high,
            }
        found |= {f"perplexity_ratio_{domain}_recovered": ratio.value for domain, ratio in self.recovered.items()}
        for adapter, by_domain in self.adapters.items():
            found |= {f"perplexity_ratio_{domain}_with_{adapter}": ratio.value for domain, ratio in by_domain.items()}
        ours, parents = self.result.engine, self.parent.engine
        if ours and parents:
            found |= {
                "load_s": ours.load_s,
                "memory_bytes": float(ours.memory_bytes),
                "memory_ratio": ours.memory_bytes / parents.memory_bytes,
                "kv_cache_tokens": float(ours.kv_cache_tokens),
                "time_to_first_token_s": ours.time_to_first_token_s,
            }
            for batch in BATCHES:
                found[f"decode_tokens_per_s_b{batch}"] = ours.tokens_per_s[batch]
                found[f"decode_speed_ratio_b{batch}"] = speed_ratio(ours, parents, batch)
        if self.result.parity is not None:
            found["engine_parity"] = self.result.parity
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def speed_ratio(ours: EngineProof, parents: EngineProof, batch: int) -> float:
    """By CPU time where the CPU computes, which other work on the machine does not change; else by the clock."""
    if device().type == "cpu":
        return ours.tokens_per_cpu_s[batch] / parents.tokens_per_cpu_s[batch]
    return ours.tokens_per_s[batch] / parents.tokens_per_s[batch]


def prove(job: CompressJob, prepared: Prepared, folder: Path, adapter: Path | None = None) -> Proof:
    """Of the checkpoint in `folder`, and of its perplexity with the adapter of a recovery on it."""
    parent, parents_rows = measure_checkpoint(job, "parent", prepared.folder, prepared)
    result, results_rows = measure_checkpoint(job, "result", folder, prepared)
    recovered_rows: dict[str, list[RowResult]] = {}
    if adapter is not None:
        for domain, examples in prepared.held_out.items():
            recovered_rows[domain] = checkpoint_rows(job, f"recovered, {domain}", folder, examples, adapter)

    def ratios(over: dict[str, list[RowResult]], rows: dict[str, list[RowResult]]) -> dict[str, Interval]:
        drawn = {domain: perplexity_ratio(over[domain], scored) for domain, scored in rows.items()}
        return {domain: confidence_interval(ratio, job.proof.num_resamples) for domain, ratio in drawn.items()}

    adapters: dict[str, dict[str, Interval]] = {}
    for name, fitted in prepared.adapters.items():
        on_parent, on_result = (
            {domain: checkpoint_rows(job, f"{name} on {label}, {domain}", base, rows, fitted) for domain, rows in prepared.held_out.items()}
            for label, base in (("parent", prepared.folder), ("result", folder))
        )
        adapters[name] = ratios(on_parent, on_result)
    return Proof(parent, result, ratios(parents_rows, results_rows), ratios(parents_rows, recovered_rows), adapters)


def perplexity_ratio(parents: Sequence[RowResult], results: Sequence[RowResult]) -> Ratio:
    """exp of the mean difference of a token's losses: both count the same tokens, so it is the perplexities' ratio."""
    pairs = [(r.loss.nats - p.loss.nats, r.loss.num_labels) for p, r in zip(parents, results, strict=True) if p.loss and r.loss]
    return Ratio(np.array([nats for nats, _ in pairs]), np.array([float(labels) for _, labels in pairs]), exponential=True)


def measure_checkpoint(job: CompressJob, label: str, folder: Path, prepared: Prepared) -> tuple[Measured, dict[str, list[RowResult]]]:
    rows: dict[str, list[RowResult]] = {}
    quality: dict[str, dict[str, Interval]] = {}
    for domain, examples in prepared.held_out.items():
        rows[domain] = checkpoint_rows(job, f"{label}, {domain}", folder, examples)
        quality[domain] = {
            name: confidence_interval(metric, job.proof.num_resamples)
            for name, metric in metrics_of(rows[domain]).items()
            if not name.startswith("rouge")
        }
    engine = parity = None
    if job.proof.engine:
        encoded = encode_all(prepared.held_out["in_domain"], prepared.tokenizer, 2**31)
        # one token is generated too
        shown = [i for i, row in enumerate(encoded) if len(row) < longest(folder)][:_PARITY_ROWS]
        spec = ModelSpec(source=str(folder), dtype=job.model.dtype)
        dtype = str(model_dtype(spec)).removeprefix("torch.")
        engine = engine_proof(folder, dtype, [_row(encoded[i]) for i in shown], job.proof.threads, job.proof.rounds)
        losses = [rows["in_domain"][i].loss for i in shown]
        num_labels = sum(loss.num_labels for loss in losses if loss)
        parity = float(np.exp((engine.nats - sum(loss.nats for loss in losses if loss)) / num_labels))
    return Measured(weights_bytes(folder), quality, engine, parity), rows


def checkpoint_rows(job: CompressJob, label: str, folder: Path, examples: list[Example], adapter: Path | None = None) -> list[RowResult]:
    """Each row's loss, and its answer where the proof asks for answers."""
    evaluation = EvaluateJob(
        subjects=(BaseSubject(),), answers=job.proof.answers, perplexity=True, max_new_tokens=job.proof.max_new_tokens, record=False
    )
    progress = ProgressLine(label)
    try:
        spec = ModelSpec(source=str(folder), dtype=job.model.dtype, trust_remote_code=job.model.trust_remote_code)
        return score_local_model(LocalModel(spec, adapter), examples, evaluation, progress.tell).rows
    finally:
        progress.close()


def _row(row: Encoded) -> tuple[list[int], list[bool]]:
    return row.input_ids, row.label_mask


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
