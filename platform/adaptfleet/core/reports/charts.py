"""Line charts and histograms as inline SVG. Colours are the page's own, so that they follow light and dark."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 38
MAX_MARKS = 400
"""Points with a mark that shows its value under the mouse; more would make the page heavy. The line has every point."""
_SMOOTHED_FROM = 80
"""Points from which on a noisy line gets a moving mean over it."""


def line_chart(title: str, points: Sequence[tuple[float, float]], noisy: bool = False, x_label: str = "step") -> str:
    """A figure with the points as a line, and a moving mean over it where it is long and `noisy`. Points that are no number are left out
    and counted."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    scale = _Scale([x for x, _ in finite], [y for _, y in finite])
    smoothed = noisy and len(finite) >= _SMOOTHED_FROM
    lines = [_polyline(finite, scale, "line faint" if smoothed else "line")]
    if smoothed:
        lines.append(_polyline(_moving_mean(finite, len(finite) // 25), scale, "line"))
    every = max(1, math.ceil(len(finite) / MAX_MARKS))
    radius = 3 if len(finite) <= 40 else 5
    shown = "mark" if len(finite) <= 40 else "mark hidden"
    marks = "".join(
        f'<circle class="{shown}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="{radius}"><title>{x_label} {x:g}: {y:.6g}</title></circle>'
        for i, (x, y) in enumerate(finite)
        if i % every == 0 or i == len(finite) - 1
    )
    left_out = len(points) - len(finite)
    note = f" · {left_out} not finite" if left_out else ""
    last = f"{finite[-1][1]:.4g}{note}"
    return _figure(title, last, scale.axes(x_label) + "".join(lines) + marks)


def histogram(title: str, values: Sequence[int] | npt.NDArray[np.int32], unit: str, num_bins: int = 24) -> str:
    """A figure of how often whole numbers fall into bins of equal width."""
    ordered = np.sort(np.asarray(values))
    if not len(ordered):
        return ""
    low, high, median = int(ordered[0]), int(ordered[-1]), int(ordered[len(ordered) // 2])
    width = max(1, math.ceil((high - low + 1) / num_bins))
    counts: list[int] = np.bincount((ordered - low) // width).tolist()
    scale = _Scale([low, low + width * len(counts)], [0, max(counts)])
    bars = ""
    for i, count in enumerate(counts):
        begin, end = low + i * width, low + (i + 1) * width - 1
        left, right = scale.x(begin) + 1, scale.x(begin + width) - 1
        span = f"{begin}" if begin == end else f"{begin} to {end}"
        bars += (
            f'<rect class="bar" x="{left:.1f}" y="{scale.y(count):.1f}" width="{max(1.0, right - left):.1f}" '
            f'height="{scale.y(0) - scale.y(count):.1f}"><title>{span} {escape(unit)}: {count}</title></rect>'
        )
    return _figure(title, f"{low} to {high}, median {median}", scale.axes(unit) + bars)


class _Scale:
    """From values to places in the drawing, and the axes between round numbers."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._x_low, self._x_high = _spread(min(xs), max(xs))
        self._y_ticks = round_ticks(*_spread(min(ys), max(ys)), 4)
        self._y_low, self._y_high = min(self._y_ticks[0], min(ys)), max(self._y_ticks[-1], max(ys))

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x_low) / (self._x_high - self._x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self._y_low) / (self._y_high - self._y_low) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str) -> str:
        parts = []
        for tick in self._y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{short_number(tick)}</text>')
        for tick in round_ticks(self._x_low, self._x_high, 5):
            if self._x_low <= tick <= self._x_high and tick == int(tick):
                parts.append(
                    f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{short_number(tick)}</text>'
                )
        parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
        return "".join(parts)


def _figure(title: str, last: str, drawing: str) -> str:
    return (
        f'<figure><figcaption><span>{escape(title)}</span><span class="last">{escape(last)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(last)}">{drawing}</svg></figure>'
    )


def _polyline(points: Sequence[tuple[float, float]], scale: _Scale, kind: str) -> str:
    places = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{places}"/>'


def _moving_mean(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Each point as the mean of those within `width` before and after it."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    spans = [(max(0, i - width), min(len(points), i + width + 1)) for i in range(len(points))]
    return [(points[i][0], (sums[end] - sums[begin]) / (end - begin)) for i, (begin, end) in enumerate(spans)]


def _spread(low: float, high: float) -> tuple[float, float]:
    """A little room where all values are one."""
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) from below `low` to above `high`."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """At most about six characters: 1.2k, 3M, 5e-05."""
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else 1e6):.3g}{unit}"
    return f"{value:.4g}"
