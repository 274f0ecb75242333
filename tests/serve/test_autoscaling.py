"""How many replicas the policy asks for."""

from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.on_ray.serve.autoscaling import Aims, Report, reports_of, summary
from adaptfleet.on_ray.serve.autoscaling import replicas_wanted as wanted_by_fleet

AIMS = Aims(requests_per_replica=8, ttft_s=2.0, kv_usage=0.8)


def replicas_wanted(reports: list[Report], held: float, aims: Aims) -> int:
    return wanted_by_fleet(summary(reports), held, aims)


CALM = {"waiting": 0.0, "kv_usage": 0.1, "ttft_s": 0.2}


def test_requests_alone() -> None:
    assert replicas_wanted([Report(8, **CALM)], 0, AIMS) == 1
    assert replicas_wanted([Report(9, **CALM)], 0, AIMS) == 2
    assert replicas_wanted([Report(20, **CALM), Report(20, **CALM)], 0, AIMS) == 5
    assert replicas_wanted([Report(0, **CALM)] * 3, 0, AIMS) == 0


def test_held_requests_start_the_first_replica() -> None:
    assert replicas_wanted([], 1, AIMS) == 1
    assert replicas_wanted([], 17, AIMS) == 3
    assert replicas_wanted([], 0, AIMS) == 0


def test_slow_first_tokens_with_a_queue_ask_for_more_and_without_for_none() -> None:
    slow = {"kv_usage": 0.1, "ttft_s": 3.0}
    assert replicas_wanted([Report(6, waiting=3, **slow)] * 2, 0, AIMS) == 3
    assert replicas_wanted([Report(6, waiting=0, **slow)] * 2, 0, AIMS) == 2
    endless = Report(6, waiting=3, kv_usage=0.1, ttft_s=600.0)
    assert replicas_wanted([endless], 0, AIMS) == 2, "one bad reading doubles at most"


def test_a_full_cache_asks_for_more() -> None:
    assert replicas_wanted([Report(2, waiting=0, kv_usage=0.95, ttft_s=0.1)] * 4, 0, AIMS) == 5


def test_one_bad_replica_of_many_is_no_reason() -> None:
    fleet = [Report(4, **CALM)] * 9 + [Report(4, waiting=4, kv_usage=0.99, ttft_s=9.0)]
    assert replicas_wanted(fleet, 0, AIMS) == 5


@given(st.lists(st.builds(Report, *[st.floats(0, 1000)] * 2, st.floats(0, 1), st.floats(0, 100)), min_size=1), st.floats(0, 1000))
def test_more_work_never_asks_for_less(reports: list[Report], held: float) -> None:
    busier = [Report(r.requests + 1, r.waiting + 1, min(1.0, r.kv_usage + 0.1), r.ttft_s + 1) for r in reports]
    assert replicas_wanted(busier, held + 1, AIMS) >= replicas_wanted(reports, held, AIMS)


def test_reads_serves_table() -> None:
    metrics = {"requests": {"a": 3.0, "b": 4.0}, "waiting": {"a": 1.0}, "kv_usage": {}, "ttft_s": {"b": 0.5}}
    assert sorted(reports_of(metrics), key=lambda report: report.requests) == [Report(3.0, 1.0, 0.0, 0.0), Report(4.0, 0.0, 0.0, 0.5)]


def test_serve_ships_the_policy_and_asks_it() -> None:
    """By value to its controller, made there with its keyword arguments."""
    from types import SimpleNamespace

    from adaptfleet.contracts.serving import ReplicaRange, ServingSpec
    from adaptfleet.on_ray.serve.deployment import _scaling

    spec = ServingSpec(replicas=ReplicaRange(min=1, max=4, requests_per_replica=8))
    shipped = _scaling(spec)["autoscaling_config"].policy
    policy = shipped.get_policy()(**shipped.policy_kwargs)
    metrics = {"requests": {"a": 20.0}, "waiting": {"a": 0.0}, "kv_usage": {"a": 0.1}, "ttft_s": {"a": 0.1}}
    asked = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=2.0, total_num_requests=22.0, policy_state={})
    assert policy(asked) == (3, {})
