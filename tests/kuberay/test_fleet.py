"""Who has the accelerators: priorities, notice before room is taken, and that nothing waits or leaves without need."""

from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.on_ray.kuberay.fleet import Claim, Plan, schedule

GPU = "nvidia.com/gpu"


def _claim(name: str, priority: int, gpus: float = 1, since: float = 0, **state: bool) -> Claim:
    return Claim(name, priority, {GPU: gpus, "cpu": 8}, since, **state)


def test_the_endpoint_takes_back_what_training_has_borrowed() -> None:
    trains = [_claim(f"train-{i}", 0, since=i, is_running=True) for i in range(3)]
    serves = _claim("serve-1", 100, is_running=True)
    wants = _claim("serve-2", 100, since=9)
    assert schedule({GPU: 4}, [*trains, serves, wants]) == Plan((), ("train-2",), ("serve-2",))
    ending = [*trains[:2], _claim("train-2", 0, since=2, is_ending=True)]
    replacement = _claim("train-3", 0, since=10)
    assert schedule({GPU: 4}, [*ending, serves, wants, replacement]) == Plan((), (), ("serve-2", "train-3")), "no second victim"
    assert schedule({GPU: 4}, [*trains[:2], serves, wants, replacement]) == Plan(("serve-2",), (), ("train-3",)), "its room is kept"
    assert schedule({GPU: 4}, [*trains[:2], serves, replacement]).start == ("train-3",), "and training grows again"


def test_nothing_leaves_for_what_would_not_fit_anyway() -> None:
    trains, other = _claim("train", 0, is_running=True), _claim("serve", 100, gpus=3, is_running=True)
    assert schedule({GPU: 4}, [trains, other, _claim("big", 50, gpus=2)]) == Plan((), (), ("big",))


def test_equals_wait_in_line_and_what_the_fleet_does_not_count_is_free() -> None:
    waiting = [_claim("second", 0, since=2), _claim("first", 0, since=1), Claim("no-gpu", 0, {"cpu": 64}, 3)]
    assert schedule({GPU: 1}, waiting) == Plan(("first", "no-gpu"), (), ("second",))


_CLAIMS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9), st.sampled_from(["waits", "runs", "ends"])), max_size=12
).map(
    lambda rows: [
        _claim(f"pod-{i}", priority, gpus, since, is_running=state == "runs", is_ending=state == "ends")
        for i, (priority, gpus, since, state) in enumerate(rows)
    ]
)


@given(st.integers(0, 16), _CLAIMS)
def test_no_room_is_given_twice_and_none_taken_in_vain(size: int, claims: list[Claim]) -> None:
    held = [claim for claim in claims if claim.is_running or claim.is_ending]
    size = max(size, int(sum(claim.amounts[GPU] for claim in held)))
    plan, by_name = schedule({GPU: size}, claims), {claim.name: claim for claim in claims}
    started = sum(by_name[name].amounts[GPU] for name in plan.start)
    assert started + sum(claim.amounts[GPU] for claim in held) <= size
    assert sorted(plan.start + plan.waiting) == sorted(claim.name for claim in claims if claim not in held)
    freed = sum(by_name[name].amounts[GPU] for name in plan.preempt)
    if plan.preempt:
        assert all(by_name[name].is_running and not by_name[name].is_ending for name in plan.preempt)
        assert freed <= sum(by_name[name].amounts[GPU] for name in plan.waiting) + 3, "no more than a pod's worth too much"
        assert min(by_name[name].priority for name in plan.preempt) < max(by_name[name].priority for name in plan.waiting)
