"""Horizontal bars as inline SVG: a few named numbers side by side, with intervals where they are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, _LEFT, _RIGHT, _TOP = 560, 34, 150, 60, 10


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    low: float | None = None
    high: float | None = None


def bar_chart(title: str, bars: Sequence[Bar], line: float | None = None) -> str:
    """A figure. `line`: where a vertical line marks a value to compare with, such as 1 for ratios."""
    if not bars:
        return ""
    most = max([*(max(bar.value, bar.high or 0.0) for bar in bars), line or 0.0]) or 1.0
    height = _TOP * 2 + ROW * len(bars)

    def x(value: float) -> float:
        return _LEFT + value / most * (WIDTH - _LEFT - _RIGHT)

    parts = []
    for i, bar in enumerate(bars):
        top, middle = _TOP + i * ROW + 6, _TOP + i * ROW + ROW / 2
        interval = "" if bar.low is None or bar.high is None else f" ({bar.low:.4g} to {bar.high:.4g})"
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(
            f'<rect class="bar" x="{_LEFT}" y="{top}" width="{max(1.0, x(bar.value) - _LEFT):.1f}" height="{ROW - 12}">'
            f"<title>{escape(bar.name)}: {bar.value:.5g}{interval}</title></rect>"
        )
        end = x(max(bar.value, bar.high or 0.0))
        if bar.low is not None and bar.high is not None:
            parts.append(f'<line class="line" x1="{x(bar.low):.1f}" y1="{middle}" x2="{x(bar.high):.1f}" y2="{middle}"/>')
        parts.append(f'<text class="tick" x="{end + 6:.1f}" y="{middle + 4:.1f}">{bar.value:.3g}</text>')
    if line is not None:
        parts.append(f'<line class="grid" x1="{x(line):.1f}" y1="{_TOP}" x2="{x(line):.1f}" y2="{height - _TOP}"/>')
    return (
        f"<figure><figcaption><span>{escape(title)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
