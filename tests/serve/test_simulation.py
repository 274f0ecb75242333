"""The simulator keeps its books, agrees with queueing theory where that has an answer, and knows a good policy from a bad one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.on_ray.serve.autoscaling import Aims
from adaptfleet.on_ray.serve.simulation import Bounds, ReplicaModel, _least_first, fit, simulate

MODEL = ReplicaModel(fixed_s=0.03, per_sequence_s=0.001, first_token_s=0.2, start_s=30, max_num_seqs=16)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(0, 400))
def test_requests_go_where_fewest_are(loads: list[int], count: int) -> None:
    expected = list(loads)
    for _ in range(count):
        expected[expected.index(min(expected))] += 1
    after = np.array(loads) + _least_first(np.array(loads, dtype=np.int64), count)
    assert sorted(after.tolist()) == sorted(expected)


def test_fits_what_was_measured() -> None:
    fixed, slope = fit([(1, 0.031), (8, 0.038), (16, 0.046)])
    assert abs(fixed - 0.03) < 1e-9
    assert abs(slope - 0.001) < 1e-9


def test_a_fixed_fleet_serves_what_it_can_and_lateness_begins_at_its_capacity() -> None:
    """16 sequences, 100 tokens each, 46 ms a step: 3.48 requests a second per replica."""
    fixed = Bounds(4, 4, 0, 0)
    aims = Aims(requests_per_replica=12, ttft_s=2.0)
    calm = simulate(np.full(1800, 0.8 * 4 * 3.48), 100, MODEL, fixed, aims)
    flooded = simulate(np.full(1800, 1.3 * 4 * 3.48), 100, MODEL, fixed, aims)
    assert calm.late_share < 0.01
    assert flooded.late_share > 0.8
    assert calm.replica_hours == 2.0


def test_scaling_costs_less_than_a_fleet_for_the_peak_and_is_rarely_late() -> None:
    rates = 40 + 30 * np.sin(np.arange(4 * 3600) / (4 * 3600) * 2 * np.pi)
    aims = Aims(requests_per_replica=8, ttft_s=2.0)
    scaled = simulate(rates, 100, MODEL, Bounds(2, 60, 5, 300), aims, first_replicas=10)
    peak = simulate(rates, 100, MODEL, Bounds(scaled.most_replicas, scaled.most_replicas, 0, 0), aims)
    assert scaled.replica_hours < 0.75 * peak.replica_hours
    assert scaled.late_share < 0.01


def test_from_nothing_requests_are_held_and_none_is_lost() -> None:
    day = simulate(np.concatenate([np.zeros(60), np.full(600, 2.0)]), 100, MODEL, Bounds(0, 4, 5, 300), Aims(8, 2.0))
    assert day.most_replicas >= 1
    assert 0 < day.replica_hours < 4 * 660 / 3600
