"""An incremental upgrade never asks for more than its surge, never sends traffic where there is no capacity, and always ends."""

from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.on_ray.kuberay.upgrade_steps import Options, Side, is_complete, is_rolled_back, next_capacity, next_traffic

_PERCENT = st.integers(1, 100)


def _walk(options: Options, rollback_at: int | None = None) -> list[tuple[Side, Side]]:
    active, pending, seen = Side(100, 100), Side(0, 0), []
    for look in range(2000):
        back = rollback_at is not None and look >= rollback_at
        seen.append((active, pending))
        if is_rolled_back(active, pending, True) if back else is_complete(active, pending):
            return seen
        weights = next_traffic(active, pending, options, None, True, back)
        if weights != (active.traffic, pending.traffic):
            active, pending = Side(active.capacity, weights[0]), Side(pending.capacity, weights[1])
            continue
        change = next_capacity(active, pending, options.surge, back)
        if change is not None:
            side, capacity = change
            active, pending = (Side(capacity, active.traffic), pending) if side == "active" else (active, Side(capacity, pending.traffic))
    raise AssertionError(f"no end in 2000 looks: {seen[-1]}")


@given(_PERCENT, _PERCENT)
def test_an_upgrade(surge: int, step: int) -> None:
    for active, pending in _walk(Options(surge, min(step, surge), 1)):
        assert active.capacity + pending.capacity <= 100 + surge
        assert active.traffic + pending.traffic == 100
        assert pending.traffic <= pending.capacity and active.traffic <= active.capacity


@given(_PERCENT, _PERCENT, st.integers(0, 60))
def test_a_way_back_from_anywhere(surge: int, step: int, look: int) -> None:
    options = Options(surge, min(step, surge), 1)
    if look >= len(_walk(options)) - 1:
        return
    walked = _walk(options, rollback_at=look)
    assert walked[-1] == (Side(100, 100), Side(0, 0))
    for active, pending in walked:
        assert active.capacity + pending.capacity <= 100 + surge and active.traffic + pending.traffic == 100


def test_traffic_waits_for_its_interval_and_for_readiness() -> None:
    active, pending, options = Side(100, 100), Side(50, 0), Options(50, 25, 10)
    assert next_traffic(active, pending, options, 9.9, True) == (100, 0)
    assert next_traffic(active, pending, options, 10, False) == (100, 0)
    assert next_traffic(active, pending, options, 10, True) == (75, 25)
    assert next_capacity(active, pending, 50) is None, "capacity waits for the traffic that it was made for"
