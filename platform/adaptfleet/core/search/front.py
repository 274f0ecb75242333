"""Pareto fronts and hypervolumes. Every objective is minimised here. Shapes: N points, M objectives."""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def dominates(a: Vector, b: Vector) -> bool:
    """Nowhere worse, somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(points_NM: Sequence[Vector]) -> list[int]:
    """Numbers of the points that none dominates, in the order given. Of equal points the first stands for all."""
    kept = []
    for i, point in enumerate(points_NM):
        beaten = any(dominates(other, point) or (j < i and list(other) == list(point)) for j, other in enumerate(points_NM))
        if not beaten and all(map(math.isfinite, point)):
            kept.append(i)
    return kept


def hypervolume(points_NM: Sequence[Vector], reference_M: Vector) -> float:
    """Volume of what the points dominate up to the reference, exactly: slabs along the last objective, Fleischer 2003."""
    inside = [point for point in points_NM if all(x < r for x, r in zip(point, reference_M, strict=True))]
    if not inside:
        return 0.0
    if len(reference_M) == 1:
        return reference_M[0] - min(point[0] for point in inside)
    inside.sort(key=lambda point: point[-1])
    total = 0.0
    for i, point in enumerate(inside):
        upper = inside[i + 1][-1] if i + 1 < len(inside) else reference_M[-1]
        if upper > point[-1]:
            slab = [other[:-1] for other in inside[: i + 1]]
            total += (upper - point[-1]) * hypervolume(slab, reference_M[:-1])
    return total


def contributions(points_NM: Sequence[Vector], reference_M: Vector) -> list[float]:
    """By how much the hypervolume shrinks without each point."""
    whole = hypervolume(points_NM, reference_M)
    return [whole - hypervolume([*points_NM[:i], *points_NM[i + 1 :]], reference_M) for i in range(len(points_NM))]


def reference(points_NM: Sequence[Vector], margin: float = 0.1) -> tuple[float, ...]:
    """The worst value of each objective on the front, and a tenth of the front's range beyond it."""
    best = [points_NM[i] for i in front(points_NM)]
    found = []
    for values in zip(*best, strict=True):
        low, high = min(values), max(values)
        found.append(high + margin * ((high - low) or abs(high) or 1.0))
    return tuple(found)


def scaled(points_NM: Sequence[Vector], by_NM: Sequence[Vector]) -> list[tuple[float, ...]]:
    """Each objective from 0, the best of `by_NM`, to 1, the worst: volumes of unlike units can then be compared."""
    lows = [min(values) for values in zip(*by_NM, strict=True)]
    spans = [(max(values) - min(values)) or 1.0 for values in zip(*by_NM, strict=True)]
    return [tuple((x - low) / span for x, low, span in zip(point, lows, spans, strict=True)) for point in points_NM]


def thinned(points_NM: Sequence[Vector], limit: int) -> list[int]:
    """At most so many numbers of a front's points: the best of each objective, then, one at a time, the point that adds most volume."""
    if len(points_NM) <= limit:
        return list(range(len(points_NM)))
    places = scaled(points_NM, points_NM)
    corner = tuple(1.1 for _ in places[0])
    chosen: list[int] = []
    for m in range(len(corner)):
        best = min(range(len(places)), key=lambda i: (places[i][m], places[i]))
        if best not in chosen and len(chosen) < limit:
            chosen.append(best)
    while len(chosen) < limit:
        rest = [i for i in range(len(places)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: hypervolume([places[j] for j in [*chosen, i]], corner)))
    return sorted(chosen)


def knee(points_NM: Sequence[Vector]) -> int:
    """The point of a front that is nearest to the corner of all best values, each objective scaled by the front's range."""
    places = scaled(points_NM, points_NM)
    return min(range(len(places)), key=lambda i: (math.hypot(*places[i]), places[i]))
