"""The report of a recipe: `report.html` in its run's folder, one page that needs nothing else."""

import os
from datetime import UTC, datetime
from pathlib import Path

import yaml

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.compression import CompressJob
from adaptfleet.core.reports.bars import Bar, bar_chart
from adaptfleet.core.reports.page import Section, charts, facts, folded, page, table, tiles
from adaptfleet.on_ray.compress.engine_proof import BATCHES
from adaptfleet.on_ray.compress.preflight import Prepared
from adaptfleet.on_ray.compress.proof import Proof, speed_ratio


def write_report(run: Path, job: CompressJob, prepared: Prepared, proof: Proof, manifest: Manifest | None) -> Path:
    """Writes the page, whole or not at all, and returns its path."""
    file = run / "report.html"
    unfinished = run / f".report.html.{os.getpid()}"
    unfinished.write_text(report(job, prepared, proof, manifest), encoding="utf-8")
    unfinished.replace(file)
    return file


def report(job: CompressJob, prepared: Prepared, proof: Proof, manifest: Manifest | None) -> str:
    made_at = manifest.created_at if manifest else datetime.now(UTC)
    recipe = " → ".join(step.kind for step in job.steps)
    subtitle = f"{recipe} · from {prepared.base} · for {job.target} · {made_at:%Y-%m-%d %H:%M} UTC"
    metrics = proof.metrics()
    glance = [("of the parent's bytes", f"{metrics['bytes_ratio']:.3f}")]
    glance += [(f"perplexity ratio, {domain.replace('_', ' ')}", f"{ratio.value:.3f}") for domain, ratio in proof.perplexity_ratio.items()]
    glance += [(f"decode speed ratio, batch {b}", f"{metrics[f'decode_speed_ratio_b{b}']:.2f}") for b in BATCHES if proof.result.engine]
    sections = [
        Section("Beside the parent", _beside(proof)),
        Section("Quality on held-out rows", _quality(proof)),
        Section("In the engine", _engine(proof)),
        Section("Lineage", _lineage(prepared, manifest)),
        Section("Contract", folded("the resolved contract", yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))),
    ]
    return page(manifest.reference if manifest else job.run_name(), subtitle, tiles(glance), sections)


def _beside(proof: Proof) -> str:
    """Everything over the parent's, which is 1."""
    quality = [Bar(domain.replace("_", " "), r.value, r.low, r.high) for domain, r in proof.perplexity_ratio.items()]
    quality += [Bar(f"{domain.replace('_', ' ')}, recovered", r.value, r.low, r.high) for domain, r in proof.recovered.items()]
    quality += [
        Bar(f"{domain.replace('_', ' ')}, with {name}", r.value, r.low, r.high)
        for name, ratios in proof.adapters.items()
        for domain, r in ratios.items()
    ]
    drawn = [bar_chart("perplexity over the parent's, 95% intervals", quality, line=1.0)]
    sizes = [Bar("bytes on disk", proof.result.num_bytes / proof.parent.num_bytes)]
    ours, parents = proof.result.engine, proof.parent.engine
    if ours and parents:
        sizes.append(Bar("memory", ours.memory_bytes / parents.memory_bytes))
        sizes.append(Bar("time to first token", ours.time_to_first_token_s / parents.time_to_first_token_s))
        drawn.append(
            bar_chart("decode speed over the parent's", [Bar(f"batch {b}", speed_ratio(ours, parents, b)) for b in BATCHES], line=1.0)
        )
    return charts([*drawn, bar_chart("size and latency over the parent's", sizes, line=1.0)])


def _quality(proof: Proof) -> str:
    rows = []
    for domain, metrics in proof.result.quality.items():
        for name, interval in metrics.items():
            parent = proof.parent.quality[domain][name]
            ratio = proof.perplexity_ratio[domain] if name == "perplexity" else None
            shown = f"{ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})" if ratio else ""
            cells = [f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g})" for value in (parent, interval)]
            rows.append((domain.replace("_", " "), name.replace("_", " "), *cells, shown))
    return table(("rows", "metric", "parent", "result", "ratio"), rows)


def _engine(proof: Proof) -> str:
    ours, parents = proof.result.engine, proof.parent.engine
    rows: list[tuple[str, ...]] = [
        (
            "bytes of the weights on disk",
            f"{proof.parent.num_bytes:,}",
            f"{proof.result.num_bytes:,}",
            _over(proof.result.num_bytes, proof.parent.num_bytes),
        )
    ]
    if ours and parents:
        for what, key, unit in (
            ("load", "load_s", "s"), ("memory taken while loading", "memory_bytes", "bytes"),
            ("time to first token", "time_to_first_token_s", "s"), ("tokens in the KV cache", "kv_cache_tokens", ""),
        ):  # fmt: skip
            mine, theirs = getattr(ours, key), getattr(parents, key)
            rows.append((what, f"{theirs:,.4g} {unit}", f"{mine:,.4g} {unit}", _over(mine, theirs)))
        for batch in BATCHES:
            cells = [
                f"{engine.tokens_per_s[batch]:.1f} tokens/s, {engine.tokens_per_cpu_s[batch]:.1f} a CPU second"
                for engine in (parents, ours)
            ]
            rows.append((f"decoding at batch {batch}", *cells, f"{speed_ratio(ours, parents, batch):.3f}"))
        rows.append(("perplexity, engine over transformers", f"{proof.parent.parity:.4f}", f"{proof.result.parity:.4f}", ""))
    return table(("what", "parent", "result", "ratio"), rows)


def _over(mine: float, theirs: float) -> str:
    return f"{mine / theirs:.3f}" if theirs else ""


def _lineage(prepared: Prepared, manifest: Manifest | None) -> str:
    files = sorted((manifest.files if manifest else {}).items())
    return facts(
        [
            ("published as", manifest.reference if manifest else "not published"),
            ("parent", prepared.base),
            ("parent's revision", prepared.revision),
            *(("serves adapters of", revision) for revision in [manifest.serves_adapters_of if manifest else None] if revision),
            *((f"SHA-256 of {path}", entry.sha256) for path, entry in files),
        ]
    )
