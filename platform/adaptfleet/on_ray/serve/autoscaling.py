"""How many replicas the endpoint should have: by the queue, the time to first token and the KV cache, not by requests alone.

`replicas_wanted` is pure, so that a simulator can ask it about a day's trace; `Policy` is what Ray Serve calls with the replicas' reports
(`Endpoint.record_autoscaling_stats`). Delays and bounds are Serve's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext


@dataclass(frozen=True, slots=True)
class Aims:
    requests_per_replica: float
    """Requests a replica serves at once without waiting; three quarters of its sequences is a good beginning."""
    ttft_s: float
    kv_usage: float = 0.85


@dataclass(frozen=True, slots=True)
class Report:
    """One replica's."""

    requests: float
    waiting: float
    kv_usage: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """All replicas' reports in the five numbers that count."""

    replicas: int
    requests: float
    waiting: float
    slowest_ttft_s: float
    """Of the worse half of the replicas, the mean: one bad replica of many is the router's business, not a reason to grow."""
    fullest_kv: float


def summary(reports: Sequence[Report]) -> Fleet:
    return Fleet(
        len(reports),
        sum(report.requests for report in reports),
        sum(report.waiting for report in reports),
        _mean_of_worst_half([report.ttft_s for report in reports]),
        _mean_of_worst_half([report.kv_usage for report in reports]),
    )


def replicas_wanted(fleet: Fleet, num_held: float, aims: Aims) -> int:
    """`num_held`: requests that wait for a replica outside of any.

    Each signal says how many times the present replicas are needed; the greatest counts. A slow first token or a full cache asks for more
    only, never for fewer: both are low when nothing is asked of an endpoint and say nothing about how many could go.
    """
    wanted = (fleet.requests + num_held) / aims.requests_per_replica
    # Slow first tokens without a queue come of long prompts or a busy machine: another replica would not mend them.
    if fleet.waiting and fleet.slowest_ttft_s > aims.ttft_s:
        wanted = max(wanted, fleet.replicas * min(fleet.slowest_ttft_s / aims.ttft_s, 2.0))
    if fleet.fullest_kv > aims.kv_usage:
        wanted = max(wanted, fleet.replicas * fleet.fullest_kv / aims.kv_usage)
    return math.ceil(wanted - 1e-9)


def _mean_of_worst_half(values: Sequence[float]) -> float:
    worst = sorted(values, reverse=True)[: math.ceil(len(values) / 2)]
    return sum(worst) / len(worst) if worst else 0.0


def reports_of(metrics: dict[str, dict[Any, float]]) -> list[Report]:
    """From Serve's table of metrics by name and replica."""
    replicas = {replica for values in metrics.values() for replica in values}
    return [
        Report(*(float(metrics.get(name, {}).get(replica, 0.0)) for name in ("requests", "waiting", "kv_usage", "ttft_s")))
        for replica in replicas
    ]


class Policy:
    """What Serve makes once, by its import path, and calls at each turn of its control loop."""

    def __init__(self, requests_per_replica: float, ttft_s: float, kv_usage: float) -> None:
        self._aims = Aims(requests_per_replica, ttft_s, kv_usage)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reports = reports_of(ctx.aggregated_metrics or {})
        # What waits at Serve's handles: in the router, and in the proxy that stands in while there is no replica.
        held = (ctx.total_queued_requests or 0.0) if reports else ctx.total_num_requests
        return replicas_wanted(summary(reports), held, self._aims), ctx.policy_state
