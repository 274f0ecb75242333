"""What the task of a finalist does, alone on its node: quality with intervals, and the real engine."""

import dataclasses
from pathlib import Path
from typing import Any

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.search import SweepJob
from adaptfleet.on_ray.compress.proof import measure_checkpoint
from adaptfleet.on_ray.tune.compress_steps import checkpoint_folder, prepared


def measure(sweep: str, folder: str, job: CompressJob, checkpoint: str | None) -> dict[str, Any]:
    """Flat metrics, as a manifest holds them."""
    found = prepared(sweep)
    if not SweepJob.model_validate_json(sweep, strict=False).finalists.out_of_domain:
        found = dataclasses.replace(found, held_out={"in_domain": found.held_out["in_domain"]})
    measured, _ = measure_checkpoint(job, checkpoint or "parent", checkpoint_folder(sweep, folder, checkpoint), found)
    metrics: dict[str, float] = {"bytes": float(measured.num_bytes)}
    for domain, quality in measured.quality.items():
        for name, interval in quality.items():
            metrics |= {f"{name}_{domain}": interval.value, f"{name}_{domain}_low": interval.low, f"{name}_{domain}_high": interval.high}
    if measured.parity is not None:
        metrics["engine_parity"] = measured.parity
    return metrics | (engine_metrics(measured.engine) if measured.engine else {})


def engine_metrics(engine: Any) -> dict[str, float]:
    found = {
        "load_s": engine.load_s,
        "memory_bytes": float(engine.memory_bytes),
        "kv_cache_tokens": float(engine.kv_cache_tokens),
        "time_to_first_token_s": engine.time_to_first_token_s,
    }
    for batch, speed in engine.tokens_per_s.items():
        found[f"decode_tokens_per_s_b{batch}"] = speed
        found[f"decode_tokens_per_cpu_s_b{batch}"] = engine.tokens_per_cpu_s[batch]
    return found


def base_facts(sweep: str) -> dict[str, Any]:
    """What a draft says of the parent."""
    from adaptfleet.core.quantization.calibration import rows_sha256

    found = prepared(sweep)
    return {"base": found.base, "revision": found.revision, "rows": rows_sha256(found.calibration), "folder": str(Path(found.folder))}
