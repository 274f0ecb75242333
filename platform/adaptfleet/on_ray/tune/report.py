"""The report of a sweep: `report.html` in its folder, one page that needs nothing else, and its plots as PNG beside it."""

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import yaml

from adaptfleet.contracts.search import SweepJob
from adaptfleet.core.reports.bars import Bar, bar_chart
from adaptfleet.core.reports.charts import line_chart
from adaptfleet.core.reports.page import Section, charts, facts, folded, page, table, tiles
from adaptfleet.core.reports.raster import png
from adaptfleet.core.reports.scatter import Dot, anchor, scatter
from adaptfleet.core.search.front import hypervolume, reference
from adaptfleet.core.search.importance import axis_importances
from adaptfleet.on_ray.tune.finalists import Settled, vector
from adaptfleet.on_ray.tune.population_report import population_section
from adaptfleet.on_ray.tune.sweep_folder import Cost, SweepFolder

_MEASURED = (
    ("perplexity_in_domain", "perplexity, in domain"),
    ("perplexity_out_of_domain", "perplexity, other task"),
    ("exact_match_in_domain", "exact match"),
    ("bytes", "bytes"),
    ("time_to_first_token_s", "first token, s"),
    ("decode_tokens_per_s_b1", "tokens/s, batch 1"),
    ("decode_tokens_per_s_b16", "tokens/s, batch 16"),
    ("decode_tokens_per_cpu_s_b16", "tokens/CPU s, batch 16"),
    ("kv_cache_tokens", "KV cache, tokens"),
    ("load_s", "load, s"),
)


def write_report(sweep: SweepJob, folder: SweepFolder, settled: Settled) -> Path:
    """Writes the plots and the page, each whole or not at all, and returns the page's path."""
    for name, figure in _plots(sweep, settled).items():
        _write(folder.path / name, png(figure))
    return _write(folder.path / "report.html", report(sweep, folder, settled).encode())


def _write(file: Path, content: bytes) -> Path:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(file)
    return file


def _plots(sweep: SweepJob, settled: Settled) -> dict[str, str]:
    """The figures that are files too, by name; those without a point are left out."""
    figures = {"front.png": _front_plot(sweep, settled), "over_time.png": _over_time(sweep, settled)}
    return {name: figure for name, figure in figures.items() if figure}


def _links(names: Iterable[str]) -> str:
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in names)
    return f"<p>As files: {links}</p>" if links else ""


def report(sweep: SweepJob, folder: SweepFolder, settled: Settled) -> str:
    costs = folder.costs()
    cpu_s = sum(cost.cpu_s for cost in costs.values())
    alone = sum(record.metrics.get("cpu_s", 0.0) for record in settled.records)
    done = {status: sum(r.status == status for r in settled.records) for status in ("finished", "stopped", "failed")}
    subtitle = f"{sweep.space.job} · {sweep.algorithm.kind} · {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    glance = [
        ("points finished", str(done["finished"])),
        ("ended early", str(done["stopped"])),
        ("failed", str(done["failed"])),
        ("on the front", str(len(settled.front))),
        ("CPU seconds spent", f"{cpu_s:,.0f}"),
        ("CPU seconds of finished points alone", f"{alone:,.0f}"),
    ]
    plots = _plots(sweep, settled)
    sections = [
        Section("Recommended", _recommended(sweep, settled)),
        Section("The front", _front_plot(sweep, settled)),
        Section("Finalists, measured", _finalists(settled)),
        Section("How the search went", charts([_over_time(sweep, settled), *_importances(sweep, settled)]) + _links(plots)),
        Section("The population", population_section(sweep, folder, settled.recommended)),
        Section("All points", _points(sweep, settled)),
        Section("What it cost", _costs(costs)),
        Section("Contract", folded("the resolved contract", yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False))),
    ]
    return page(f"sweep/{sweep.name}", subtitle, tiles(glance), sections)


def _recommended(sweep: SweepJob, settled: Settled) -> str:
    point = settled.recommended.point_id
    published = next((f.reference for f in settled.finalists if f.record is settled.recommended), None)
    rows = [("point", point), ("why", settled.reason), ("published as", published or "not published")]
    if published:
        name = published.partition("@")[0]
        serve = f"adaptfleet serve --set model.source={name}" if sweep.space.job == "compress" else "adaptfleet serve"
        rows += [("promote it", f"adaptfleet promote sweep/{sweep.name}#{point}"), ("serve it", serve)]
    return facts(rows)


def _front_plot(sweep: SweepJob, settled: Settled) -> str:
    goals = sweep.space.objectives
    if len(goals) < 2:
        return ""
    down, across = goals[0], goals[1]
    scale, unit = (1e6, "MB") if across.metric in ("bytes", "memory_bytes") else (1.0, "")
    within, best = {r.point_id for r in settled.feasible}, {r.point_id for r in settled.front}
    dots = [
        Dot(
            name=record.point_id,
            x=record.metrics[across.metric] / scale,
            y=record.metrics[down.metric],
            is_best=record.point_id in best,
            is_barred=record.point_id not in within,
            values={axis: _label(value) for axis, value in record.point.items()},
            detail=f"{record.point_id}\n" + "\n".join(f"{key} {value:.6g}" for key, value in record.metrics.items()),
        )
        for record in settled.records
        if record.status == "finished" and across.metric in record.metrics and down.metric in record.metrics
    ]
    labels = (f"{across.metric}{', ' + unit if unit else ''}", down.metric)
    baseline = settled.baseline.point_id if settled.baseline else None
    up = (across.goal == "max", down.goal == "max")
    return scatter(f"{labels[1]} against {labels[0]}", dots, *labels, baseline, settled.recommended.point_id, up)


def _finalists(settled: Settled) -> str:
    rows: list[tuple[str, str, dict[str, float]]] = []
    if settled.baseline_metrics and settled.baseline:
        rows.append((f"{settled.baseline.point_id} (baseline)", "", settled.baseline_metrics))
    rows += [
        (f.record.point_id, f.reference or ("not published" if f.fault else "the parent itself"), f.metrics) for f in settled.finalists
    ]
    shown = [(key, title) for key, title in _MEASURED if any(key in metrics for _, _, metrics in rows)]
    body = [(name, where, *(f"{m[key]:.5g}" if key in m else "" for key, _ in shown)) for name, where, m in rows]
    noise = [(f"noise of {name}", f"{value:.1%} between two measurements of the baseline") for name, value in settled.noise.items()]
    faults = [(f"{f.record.point_id} is not served", f.fault.strip().splitlines()[-1]) for f in settled.finalists if f.fault]
    return table(("point", "published as", *(title for _, title in shown)), body) + facts(noise + faults)


def _over_time(sweep: SweepJob, settled: Settled) -> str:
    """Hypervolume of what was finished by then, over that of the end."""
    if len(sweep.space.objectives) < 2:
        goal = sweep.space.objectives[0]
        points = [(r.search_s, r.metrics[goal.metric]) for r in sorted(settled.feasible, key=lambda r: r.search_s)]
        return line_chart(goal.metric, points, x_label="seconds of the search")
    ordered = sorted(settled.feasible, key=lambda record: record.search_s)
    vectors = [vector(sweep, record) for record in ordered]
    corner = reference(vectors)
    whole = hypervolume(vectors, corner) or 1.0
    points = [(record.search_s, hypervolume(vectors[: i + 1], corner) / whole) for i, record in enumerate(ordered)]
    return line_chart("hypervolume, of the end's", points, x_label="seconds of the search")


def _importances(sweep: SweepJob, settled: Settled) -> list[str]:
    drawn = []
    for objective in sweep.space.objectives:
        values = [record.metrics[objective.metric] for record in settled.feasible]
        shares = axis_importances([record.point for record in settled.feasible], values, objective.goal == "min")
        drawn.append(bar_chart(f"what counts for {objective.metric} (PED-ANOVA)", [Bar(axis, share) for axis, share in shares.items()]))
    return drawn


def _points(sweep: SweepJob, settled: Settled) -> str:
    """Rows that the plot's dots lead to."""
    best = {record.point_id for record in settled.front}
    metrics = list(dict.fromkeys(key for record in settled.records for key in record.metrics))
    head = "".join(f"<th>{escape(title)}</th>" for title in ("point", *sweep.space.axes, "came to", *metrics, "why"))
    body = ""
    for record in sorted(settled.records, key=lambda r: (r.point_id not in best, r.status, r.point_id)):
        state = "on the front" if record.point_id in best else record.status
        cells = [record.point_id, *(_label(record.point[axis]) for axis in sweep.space.axes), state]
        cells += [f"{record.metrics[key]:.5g}" if key in record.metrics else "" for key in metrics]
        cells.append(record.reason[:300])
        inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr id="{escape(anchor(record.point_id))}">{inner}</tr>'
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _costs(costs: dict[str, Cost]) -> str:
    kinds: dict[str, list[Cost]] = {}
    for name, cost in costs.items():
        kinds.setdefault("ended early" if ".ended-" in name else name.partition("-")[0], []).append(cost)
    rows = [
        (
            kind,
            str(len(made)),
            f"{sum(c.cpu_s for c in made):,.1f}",
            f"{sum(c.wall_s for c in made):,.1f}",
            f"{sum(c.tokens for c in made):,}",
        )
        for kind, made in sorted(kinds.items())
    ]
    return table(("step", "times", "CPU seconds", "seconds", "tokens trained on"), rows)


def _label(value: object) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
