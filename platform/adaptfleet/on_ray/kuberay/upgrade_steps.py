"""The next step of an incremental upgrade, as the operator's `rayservice_controller.go` (v1.7.0) takes it. Pure.

Capacity is Serve's `target_capacity`, traffic the weight of the route, both in percent. Capacity moves by `surge` and only while it equals
the traffic of the cluster that grows; traffic follows it by `step`, one an interval. Capacity of both never exceeds 100 + surge.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    capacity: int
    traffic: int


@dataclass(frozen=True)
class Options:
    surge: int
    step: int
    interval_s: float


def next_capacity(active: Side, pending: Side, surge: int, rolling_back: bool = False) -> tuple[str, int] | None:
    """Which of the two changes, and to what; None: nothing now."""
    total = active.capacity + pending.capacity
    if rolling_back:
        if active.capacity != active.traffic or (active.capacity == 100 and pending.capacity == 0):
            return None
        return ("pending", max(0, pending.capacity - surge)) if total > 100 else ("active", min(100, active.capacity + surge))
    if pending.capacity != pending.traffic or (active.capacity == 0 and pending.capacity == 100):
        return None
    return ("active", max(0, active.capacity - surge)) if total > 100 else ("pending", min(100, pending.capacity + surge))


def next_traffic(
    active: Side, pending: Side, options: Options, since_last_s: float | None, pending_is_ready: bool, rolling_back: bool = False
) -> tuple[int, int]:
    """Weights of active and pending. `since_last_s`: since traffic last moved; None: never."""
    grown = active if rolling_back else pending
    is_early = since_last_s is not None and since_last_s < options.interval_s
    if grown.traffic == grown.capacity or is_early or not (pending_is_ready or rolling_back):
        return active.traffic, pending.traffic
    more = min(100, grown.traffic + options.step, grown.capacity)
    return (more, 100 - more) if rolling_back else (100 - more, more)


def is_complete(active: Side, pending: Side) -> bool:
    return active.capacity == 0 and pending.traffic == 100


def is_rolled_back(active: Side, pending: Side, pending_is_healthy: bool) -> bool:
    return active == Side(100, 100) and (not pending_is_healthy or pending == Side(0, 0))
