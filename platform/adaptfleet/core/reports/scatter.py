"""Two objectives against each other as inline SVG, to look into: what a dot is shows under the mouse, a click leads to its row, and boxes
hide the dots of a value. Nothing runs: it is all markup and style."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from adaptfleet.core.reports.charts import round_ticks, short_number

WIDTH, HEIGHT = 980, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 16, 46
_STYLE = """
.pareto .dot { fill: var(--soft); opacity: 0.65; } .pareto .dot.best { fill: var(--accent); opacity: 1; }
.pareto .dot.barred { fill: none; stroke: var(--soft); } .pareto .dot:hover { stroke: var(--ink); stroke-width: 2; opacity: 1; }
.pareto .ring { fill: none; stroke: var(--good); stroke-width: 2.4; } .pareto .cross { stroke: var(--bad); stroke-width: 2; }
.pareto .steps { fill: none; stroke: var(--accent); stroke-width: 1.2; stroke-dasharray: 4 3; }
.pareto .boxes { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13px; color: var(--soft); padding: 8px 0 4px; }
.pareto .boxes label { margin-left: 8px; color: var(--ink); white-space: nowrap; }
.pareto .key { font-size: 12.5px; color: var(--soft); }
tr:target td { background: color-mix(in srgb, var(--accent) 22%, transparent); }
"""


@dataclass(frozen=True)
class Dot:
    name: str
    x: float
    y: float
    is_best: bool = False
    """On the front."""
    is_barred: bool = False
    """It breaks a constraint."""
    values: Mapping[str, str] = field(default_factory=dict)
    """By axis: what it is filtered by."""
    detail: str = ""


def scatter(
    title: str,
    dots: Sequence[Dot],
    x_label: str,
    y_label: str,
    baseline: str | None = None,
    recommended: str | None = None,
    up: tuple[bool, bool] = (False, False),
) -> str:
    """A figure. `up`: whether more is better, of x and of y; the front's stairs turn accordingly."""
    if not dots:
        return ""
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    x_ticks, y_ticks = round_ticks(*_room(xs), 6), round_ticks(*_room(ys), 5)

    def x(value: float) -> float:
        return _LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y(tick):.1f}" x2="{WIDTH - _RIGHT}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{short_number(tick)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="tick" x="{_LEFT + 6}" y="{_TOP + 10}">{escape(y_label)}</text>')
    best = sorted((dot for dot in dots if dot.is_best), key=lambda dot: -dot.x if up[0] else dot.x)
    corners = [f"{x(best[0].x):.1f},{y(best[0].y):.1f}"] if best else []
    for before, after in itertools.pairwise(best):
        corners += [f"{x(after.x):.1f},{y(before.y):.1f}", f"{x(after.x):.1f},{y(after.y):.1f}"]
    parts.append(f'<polyline class="steps" points="{" ".join(corners)}"/>')
    for dot in sorted(dots, key=lambda dot: dot.is_best):
        marks = " ".join(_mark(axis, value) for axis, value in dot.values.items())
        kind = "dot barred" if dot.is_barred else "dot best" if dot.is_best else "dot"
        place = f'cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}"'
        inner = f'<circle class="{kind}" {place} r="{6 if dot.is_best else 5}"><title>{escape(dot.detail or dot.name)}</title></circle>'
        if dot.name == recommended:
            inner += f'<circle class="ring" {place} r="10"/>'
        if dot.name == baseline:
            left, top = x(dot.x), y(dot.y)
            inner += f'<path class="cross" d="M{left - 9:.1f} {top:.1f}h18M{left:.1f} {top - 9:.1f}v18"/>'
        parts.append(f'<a class="{marks}" href="#{escape(anchor(dot.name))}">{inner}</a>')
    boxes, rules = _boxes(dots)
    key = "filled: on the front · ring: recommended · cross: the baseline · hollow: breaks a constraint"
    return (
        f'<figure class="pareto"><style>{_STYLE}{rules}</style><figcaption><span>{escape(title)}</span></figcaption>{boxes}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="key">{key}</div></figure>'
    )


def anchor(name: str) -> str:
    """Of a point's row in the table."""
    return f"point-{name}"


def _boxes(dots: Sequence[Dot]) -> tuple[str, str]:
    shown, rules = [], []
    axes = list(dict.fromkeys(axis for dot in dots for axis in dot.values))
    for axis in axes:
        values = list(dict.fromkeys(dot.values[axis] for dot in dots if axis in dot.values))
        if not 1 < len(values) <= 12:
            continue
        inner = ""
        for value in values:
            mark = _mark(axis, value)
            inner += f'<label><input type="checkbox" id="box-{mark}" checked> {escape(value)}</label>'
            rules.append(f".pareto:has(#box-{mark}:not(:checked)) .{mark} {{ display: none; }}")
        shown.append(f"<span>{escape(axis)}{inner}</span>")
    return f'<div class="boxes">{"".join(shown)}</div>' if shown else "", "\n".join(rules)


def _mark(axis: str, value: str) -> str:
    """A class name of letters, digits and dashes."""
    return "v-" + "".join(c if c.isalnum() and c.isascii() else f"-{ord(c):x}-" for c in f"{axis}_{value}")


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room
