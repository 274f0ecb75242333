"""Policies, limits and shares of tenants: pure bookkeeping, with times that the tests give."""

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.tenants import Budget, TenantPolicy, TenantsSpec
from adaptfleet.on_ray.serve.accounts import Accounts, Report, Used
from adaptfleet.on_ray.serve.crowding import Crowd
from adaptfleet.on_ray.serve.fair_order import FairOrder, Ticket
from adaptfleet.on_ray.serve.ledger import Ledger
from adaptfleet.on_ray.serve.policy_file import PolicyFile, policy_file
from adaptfleet.on_ray.serve.refusal import RefusalError

POLICIES = """
defaults: {requests_per_min: 60, models: ["smollm2-135m", "shared-*"]}
aliases: {gpt-4o-mini: smollm2-135m}
tenants:
  acme: {tokens_per_min: 1000, owns: ["acme-*"], aliases: {helper: acme-chat}}
  beta: {models: ["*"], requests_per_min: 5, priority: high, weight: 2}
  root: {operator: true}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.day = datetime(2026, 1, 31, 23, 0, tzinfo=UTC)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(clock: Clock) -> Accounts:
    return Accounts(clock, lambda: clock.day)


def _refusal(accounts: Accounts, policy: TenantPolicy, estimate: int = 0, tenant: str = "acme") -> RefusalError:
    with pytest.raises(RefusalError) as raised:
        accounts.admit(tenant, policy, estimate)
    assert raised.value.status == 429
    return raised.value


# policies


def test_a_tenants_own_keys_lie_over_the_defaults() -> None:
    spec = parse_contract(TenantsSpec, POLICIES)
    assert (spec.policy("acme").requests_per_min, spec.policy("acme").tokens_per_min) == (60, 1000)
    assert (spec.policy("beta").requests_per_min, spec.policy("beta").priority, spec.policy("beta").weight) == (5, "high", 2.0)
    assert spec.policy("nobody") == spec.defaults
    assert spec.alias("acme", "helper") == "acme-chat"
    assert spec.alias("beta", "helper") == "helper"
    assert spec.alias("beta", "gpt-4o-mini") == "smollm2-135m"
    assert spec.aliases_of({"acme-chat"}) == {"helper"} and spec.aliases_of({"other"}) == set()


def test_who_sees_what() -> None:
    spec = parse_contract(TenantsSpec, POLICIES)
    seen = {
        tenant: [name for name in ("smollm2-135m", "shared-x", "acme-chat", "other") if spec.may_see(tenant, name)]
        for tenant in ("acme", "beta", "x")
    }
    assert seen == {
        "acme": ["smollm2-135m", "shared-x", "acme-chat"],
        "beta": ["smollm2-135m", "shared-x", "other"],  # everything, but not what another owns
        "x": ["smollm2-135m", "shared-x"],
    }


def test_operators() -> None:
    assert TenantsSpec().is_operator("default")
    assert not TenantsSpec().is_operator("acme")
    assert parse_contract(TenantsSpec, POLICIES).is_operator("root")
    assert not parse_contract(TenantsSpec, "tenants: {default: {operator: false}}").is_operator("default")


def test_every_mistake_in_the_policies_is_listed() -> None:
    with pytest.raises(ContractError) as raised:
        parse_contract(
            TenantsSpec, "defaults: {requests_per_min: 0}\ntenants: {a: {priority: urgent, wait: 1, models: ['/etc/*']}, '../b': {}}"
        )
    for said in ("defaults.requests_per_min", "priority", "wait: unknown key", "models", "safe name"):
        assert said in str(raised.value)


def test_a_name_has_one_owner() -> None:
    with pytest.raises(ContractError, match=r"owned by two tenants: 'x-\*' \(a and b\)"):
        parse_contract(TenantsSpec, "tenants: {a: {owns: ['x-*']}, b: {owns: ['x-*']}}")


def test_the_file_is_read_again_and_never_falls_open(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.policy_file._RECHECK_S", 0.0)
    assert PolicyFile().now == TenantsSpec()
    policy_file().write_text("defaults: {max_concurrent: 3}")
    policies = PolicyFile()
    assert policies.now.policy("x").max_concurrent == 3
    policy_file().write_text("defaults: {max_concurrent: 4}")
    assert policies.now.policy("x").max_concurrent == 4
    policy_file().write_text("defaults: {max_concurent: 4000}")
    assert policies.now.policy("x").max_concurrent == 4
    assert "Did you mean 'max_concurrent'" in caplog.text
    policy_file().unlink()
    assert policies.now.policy("x").max_concurrent == 4


# limits


def test_requests_a_minute(accounts: Accounts, clock: Clock) -> None:
    policy = TenantPolicy(requests_per_min=3)
    for _ in range(3):
        accounts.settle(accounts.admit("acme", policy, 0))
    refusal = _refusal(accounts, policy)
    assert (refusal.code, refusal.retry_after_s) == ("rate_limit_exceeded", 20)
    accounts.admit("beta", policy, 0)  # another tenant has its own
    clock.now += 20
    accounts.admit("acme", policy, 0)
    _refusal(accounts, policy)
    clock.now += 600  # no more than a minute's amount is ever saved up
    for _ in range(3):
        accounts.admit("acme", policy, 0)
    _refusal(accounts, policy)


def test_tokens_a_minute_are_what_the_engine_counted(accounts: Accounts, clock: Clock) -> None:
    policy = TenantPolicy(tokens_per_min=600)
    grant = accounts.admit("acme", policy, 500)
    assert "100 of its 600" in str(_refusal(accounts, policy, 200).message)
    grant.prompt_tokens, grant.output_tokens = 10, 40
    accounts.settle(grant)
    accounts.settle(grant)  # once is enough
    second = accounts.admit("acme", policy, 550)
    second.prompt_tokens = 1150  # it took more than there was: the bucket is 600 below zero
    accounts.settle(second)
    assert _refusal(accounts, policy, 1).retry_after_s == 61
    clock.now += 61
    accounts.admit("acme", policy, 1)


def test_a_request_larger_than_the_whole_limit_is_admitted_from_a_full_bucket(accounts: Accounts, clock: Clock) -> None:
    policy = TenantPolicy(tokens_per_min=100)
    accounts.admit("acme", policy, 5000)
    assert _refusal(accounts, policy, 1).retry_after_s == 2941
    clock.now += 60 * 50
    accounts.admit("acme", policy, 5000)


def test_requests_in_flight(accounts: Accounts) -> None:
    policy = TenantPolicy(max_concurrent=2)
    grants = [accounts.admit("acme", policy, 0) for _ in range(2)]
    assert _refusal(accounts, policy).code == "concurrency_limit_exceeded"
    accounts.settle(grants[0])
    accounts.admit("acme", policy, 0)


@pytest.mark.parametrize(("per", "retry_after_s"), [("day", 3600), ("month", 3600), ("ever", None)])
def test_a_budget_ends_with_its_period(accounts: Accounts, clock: Clock, per: str, retry_after_s: int | None) -> None:
    policy = TenantPolicy.model_validate({"token_budget": {"tokens": 100, "per": per}})
    grant = accounts.admit("acme", policy, 1000)  # the last one may go over it
    grant.prompt_tokens = 60
    grant.output_tokens = 60
    accounts.settle(grant)
    refusal = _refusal(accounts, policy)
    assert (refusal.code, refusal.retry_after_s) == ("insufficient_quota", retry_after_s)
    clock.day = datetime(2026, 2, 1, 0, 1, tzinfo=UTC)
    if per == "ever":
        _refusal(accounts, policy)
    else:
        accounts.admit("acme", policy, 0)


def test_limits_that_change_keep_what_was_used(accounts: Accounts) -> None:
    for _ in range(3):
        accounts.admit("acme", TenantPolicy(requests_per_min=3), 0)
    for _ in range(2):
        accounts.admit("acme", TenantPolicy(requests_per_min=5), 0)
    _refusal(accounts, TenantPolicy(requests_per_min=5))
    accounts.admit("acme", TenantPolicy(), 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 8)), max_size=60))
@example(1, [(0.0, 1), (1.55221192302659, 2), (1.1807304506754512, 8), (1.5079594780865726, 8)])  # the last bit of a wait
def test_no_more_than_the_limit_and_what_time_gave_back(limit: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    accounts = Accounts(clock, lambda: clock.day)
    began, num_admitted = clock.now, 0
    for pause_s, num_tries in steps:
        clock.now += pause_s
        for _ in range(num_tries):
            try:
                accounts.admit("acme", TenantPolicy(requests_per_min=limit), 0)
                num_admitted += 1
            except RefusalError as refusal:
                assert refusal.retry_after_s is not None
                clock.now += refusal.retry_after_s  # who waits as told is admitted
                accounts.admit("acme", TenantPolicy(requests_per_min=limit), 0)
                num_admitted += 1
        assert num_admitted <= limit + (clock.now - began) * limit / 60 + 1e-6


# between replicas


def test_what_others_use_counts_here(accounts: Accounts) -> None:
    policy = TenantPolicy(requests_per_min=10, tokens_per_min=1000, max_concurrent=3)
    accounts.settle(accounts.admit("acme", policy, 0))
    accounts.learn({"acme": Report(in_flight=0, requests=100, tokens=10_000)}, {})  # where they stand, from before
    accounts.admit("acme", policy, 0)
    accounts.learn({"acme": Report(in_flight=2, requests=104, tokens=10_990)}, {})
    assert _refusal(accounts, policy).code == "concurrency_limit_exceeded"
    accounts.learn({"acme": Report(in_flight=0, requests=104, tokens=10_990)}, {})
    assert _refusal(accounts, policy, 500).code == "rate_limit_exceeded"
    accounts.learn({}, {})  # that replica left; what it used stays used
    assert _refusal(accounts, policy, 500).code == "rate_limit_exceeded"
    for _ in range(4):
        accounts.settle(accounts.admit("acme", TenantPolicy(requests_per_min=10), 0))
    assert _refusal(accounts, TenantPolicy(requests_per_min=10)).code == "rate_limit_exceeded"


def test_a_ledger_tells_replicas_of_each_other_and_keeps_usage(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.ledger._WRITE_S", 0.0)
    url = tmp_path.as_uri()
    one, two = "1" * 32, "2" * 32

    async def talk() -> None:
        ledger = Ledger(url)
        await ledger.exchange(one, {"acme": Report(2, 5, 500)}, {"2026-01-31": {"acme": (5, 300, 200)}})
        others, budgets = await ledger.exchange(two, {"acme": Report(1, 1, 10)}, {})
        assert others == {"acme": Report(2, 5, 500)}
        assert budgets["acme"] == {"2026-01-31": Used(5, 300, 200), "2026-01": Used(5, 300, 200), "ever": Used(5, 300, 200)}
        others, budgets = await ledger.exchange(one, {"acme": Report(2, 5, 500)}, {"2026-01-31": {"acme": (5, 300, 200)}})
        assert (others, budgets) == ({"acme": Report(1, 1, 10)}, {}), "a replica is never told its own"
        await ledger.kept()
        # A new ledger, after all died: the store has it; and a replica that lives on reports more without being counted twice.
        again = Ledger(url)
        _, budgets = await again.exchange(two, {}, {})
        assert budgets["acme"]["2026-01"] == Used(5, 300, 200)
        await again.exchange(one, {}, {"2026-01-31": {"acme": (6, 310, 210)}})
        _, budgets = await again.exchange(two, {}, {})
        assert budgets["acme"]["ever"] == Used(6, 310, 210)

    asyncio.run(talk())
    accounts = Accounts(clock, lambda: clock.day)
    accounts.learn({}, {"acme": {"2026-01": Used(1, 60, 40)}})
    refusal = _refusal(accounts, TenantPolicy(token_budget=Budget(tokens=100)))
    assert refusal.code == "insufficient_quota"


def test_a_piece_of_work_is_one_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> None:
        ledger = Ledger(tmp_path.as_uri())
        assert not await ledger.claim("a", "batch-1"), "a new ledger listens first"
        await ledger.exchange("b", {}, {}, ("batch-2",))
        monkeypatch.setattr("adaptfleet.on_ray.serve.ledger._CLAIM_QUIET_S", 0.0)
        assert not await ledger.claim("a", "batch-2"), "b holds it"
        assert await ledger.claim("a", "batch-1")
        assert await ledger.claim("a", "batch-1")
        assert not await ledger.claim("b", "batch-1")
        await ledger.release("b", "batch-1")
        assert not await ledger.claim("b", "batch-1")
        await ledger.release("a", "batch-1")
        assert await ledger.claim("b", "batch-1")
        monkeypatch.setattr("adaptfleet.on_ray.serve.ledger._GONE_S", -1.0)
        assert await ledger.claim("a", "batch-1"), "b has said nothing for too long"

    asyncio.run(talk())


# fair shares


def _serve(order: FairOrder, waiting: list[Ticket], num: int, num_tokens: int = 100) -> list[Ticket]:
    """An engine that takes the smallest number first, as vLLM's does."""
    served = []
    for _ in range(num):
        waiting.sort(key=lambda ticket: ticket.priority)
        ticket = waiting.pop(0)
        order.begin(ticket)
        order.end(ticket, num_tokens)
        served.append(ticket)
    return served


def test_a_flood_does_not_hold_up_the_others() -> None:
    order = FairOrder()
    waiting = [order.ticket("flood", "normal", 1, 100) for _ in range(100)]
    _serve(order, waiting, 10)
    waiting += [order.ticket("small", "normal", 1, 100) for _ in range(3)]
    assert [ticket.tenant for ticket in _serve(order, waiting, 7)].count("small") == 3


def test_shares_follow_weights_and_sizes() -> None:
    order = FairOrder()
    waiting = [order.ticket("double", "normal", 2, 100) for _ in range(200)]
    waiting += [order.ticket("single", "normal", 1, 100) for _ in range(200)]
    waiting += [order.ticket("long", "normal", 1, 400) for _ in range(200)]
    random.Random(1).shuffle(waiting)
    served = [ticket.tenant for ticket in _serve(order, waiting, 130)]
    tokens = {"double": served.count("double") * 100, "single": served.count("single") * 100, "long": served.count("long") * 400}
    assert tokens["double"] / tokens["single"] == pytest.approx(2, rel=0.1)
    assert tokens["long"] / tokens["single"] == pytest.approx(1, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=40, max_size=80), st.lists(st.integers(1, 500), min_size=40, max_size=80))
def test_what_two_who_always_wait_get_differs_by_no_more_than_two_requests(one: list[int], other: list[int]) -> None:
    order = FairOrder()
    waiting = [order.ticket("one", "normal", 1, size) for size in one] + [order.ticket("other", "normal", 1, size) for size in other]
    left = {"one": len(one), "other": len(other)}
    got = {"one": 0.0, "other": 0.0}
    while all(left.values()):
        waiting.sort(key=lambda ticket: ticket.priority)
        ticket = waiting.pop(0)
        order.begin(ticket)
        got[ticket.tenant] += ticket.cost
        left[ticket.tenant] -= 1
        assert abs(got["one"] - got["other"]) <= max(one) + max(other) + 2


def test_idling_saves_nothing_up_and_classes_come_first() -> None:
    order = FairOrder()
    _serve(order, [order.ticket("busy", "normal", 1, 100) for _ in range(50)], 50)
    waiting = [order.ticket("busy", "normal", 1, 100) for _ in range(10)] + [order.ticket("late", "normal", 1, 100) for _ in range(10)]
    assert [ticket.tenant for ticket in _serve(order, waiting, 10)].count("late") in (4, 5, 6)
    mixed = [order.ticket("a", klass, 1, 100) for klass in ("shadow", "batch", "low", "normal", "high")]
    assert [ticket.klass for ticket in _serve(order, mixed, 5)] == ["high", "normal", "low", "batch", "shadow"]


def test_a_wrong_estimate_is_made_good() -> None:
    order = FairOrder()
    _serve(order, [order.ticket("hungry", "normal", 1, 1)], 1, num_tokens=1000)
    waiting = [order.ticket("hungry", "normal", 1, 100), *(order.ticket("modest", "normal", 1, 100) for _ in range(12))]
    assert [ticket.tenant for ticket in _serve(order, waiting, 13)].index("hungry") >= 9


# a full house


def test_a_flood_does_not_fill_the_house() -> None:
    crowd = Crowd(80)
    for _ in range(70):
        crowd.enter("flood", 1)
    for _ in range(3):
        with pytest.raises(RefusalError, match="flood has its share") as raised:
            crowd.enter("flood", 1)
        assert (raised.value.status, raised.value.retry_after_s) == (503, 1)
    for _ in range(10):
        crowd.enter("small", 1)
    for _ in range(40):
        crowd.leave("flood")
    for _ in range(30):
        crowd.enter("flood", 1)
    with pytest.raises(RefusalError):
        crowd.enter("flood", 1)
    crowd.enter("heavy", 3)
    for _ in range(70):
        crowd.leave("flood") if crowd._inside["flood"] else None
    for tenant in ("small",) * 10 + ("heavy",):
        crowd.leave(tenant)
    assert (crowd._inside, crowd._weights) == ({}, {}), "who has left is forgotten"
