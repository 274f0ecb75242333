"""Fronts and hypervolumes against their definitions."""

import itertools
import math
import random

import pytest

from adaptfleet.core.search.front import contributions, dominates, front, hypervolume, knee, reference, thinned
from adaptfleet.core.search.importance import axis_importances


def drawn(seed: int, count: int, num_objectives: int) -> list[tuple[float, ...]]:
    """On a coarse grid, so that there are equal values and equal points."""
    generator = random.Random(seed)
    return [tuple(generator.randint(0, 9) / 10 for _ in range(num_objectives)) for _ in range(count)]


def by_inclusion_and_exclusion(points: list[tuple[float, ...]], corner: tuple[float, ...]) -> float:
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            shared = math.prod(max(0.0, r - max(values)) for r, values in zip(corner, zip(*chosen, strict=True), strict=True))
            total += (-1) ** (size + 1) * shared
    return total


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_hypervolume_is_the_volume_of_the_boxes_together(num_objectives: int) -> None:
    corner = (0.8,) * num_objectives
    for seed in range(12):
        points = drawn(seed, 7, num_objectives)
        assert hypervolume(points, corner) == pytest.approx(by_inclusion_and_exclusion(points, corner), abs=1e-12)


def test_hypervolume_agrees_with_optunas() -> None:
    import numpy as np
    from optuna._hypervolume import compute_hypervolume

    for seed in range(6):
        points = drawn(seed, 40, 3)
        expected = compute_hypervolume(np.array([p for p in points if max(p) < 0.95]), np.array([0.95] * 3))
        assert hypervolume(points, (0.95,) * 3) == pytest.approx(expected)


def test_the_front_holds_what_none_dominates_and_one_of_equals() -> None:
    for seed in range(20):
        points = drawn(seed, 25, 3)
        kept = front(points)
        for i, point in enumerate(points):
            beaten = any(dominates(other, point) for other in points)
            twin = any(list(points[j]) == list(point) for j in kept)
            assert (i in kept) == (not beaten and points.index(point) == i)
            assert beaten or twin
        assert hypervolume(points, (1.0,) * 3) == pytest.approx(hypervolume([points[i] for i in kept], (1.0,) * 3))


def test_a_loss_that_is_no_number_is_on_no_front() -> None:
    assert front([(math.nan, 1.0), (2.0, 2.0), (math.inf, 0.0)]) == [1]


def test_contributions_are_what_is_lost_without_a_point() -> None:
    points = [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.6, 0.6)]
    corner = (1.0, 1.0)
    lost = contributions(points, corner)
    assert lost[3] == pytest.approx(0) and all(value > 0 for value in lost[:3])
    # the square between its neighbours, less what the dominated point would then stand for
    assert lost[1] == pytest.approx(0.4 * 0.4 - 0.3 * 0.3)


def test_ends_stay_when_a_front_is_thinned_and_the_knee_is_the_bend() -> None:
    points = [(0.0, 1.0), (0.02, 0.9), (0.1, 0.1), (0.5, 0.08), (1.0, 0.0)]
    assert thinned(points, 3) == [0, 2, 4]
    assert thinned(points, 9) == [0, 1, 2, 3, 4]
    assert knee(points) == 2
    assert all(r > max(values) for r, values in zip(reference(points), zip(*points, strict=True), strict=True))


def test_the_axis_that_decides_counts_most() -> None:
    points = [{"ratio": r, "seed": s, "fixed": 1} for r in (0.0, 0.1, 0.2) for s in range(4)]
    shares = axis_importances(points, [point["ratio"] + 0.001 * point["seed"] for point in points])
    assert next(iter(shares)) == "ratio" and shares["ratio"] > 0.5 and "fixed" not in shares
    assert axis_importances(points[:2], [1.0, 2.0]) == {}
