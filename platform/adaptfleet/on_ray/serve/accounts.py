"""What each tenant has used, and whether its limits admit one more request. Pure bookkeeping; times are given.

Requests and tokens are token buckets of a minute: a tenant may use a minute's amount at once, and gets it back evenly. A request takes an
estimate of its tokens when it is admitted; when it ends, the engine's own count takes the estimate's place. So a bucket may go below zero,
and admits nothing until it has filled again.

Every replica keeps its own accounts. What others have used is told by the ledger (`learn`) and taken from the same buckets, so that all
replicas enforce one limit, each on knowledge a fraction of a second old.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from adaptfleet.contracts.tenants import Budget, TenantPolicy
from adaptfleet.on_ray.serve.refusal import RefusalError

_MINUTE_S = 60.0
_ROUNDING = 1e-9
"""Who waited exactly as long as told is admitted, whatever became of the last bit."""
_CONCURRENCY_RETRY_S = 1


@dataclass(slots=True)
class Used:
    """Counts that only grow, so that reports of them can be repeated, lost or merged without harm."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def __add__(self, other: "Used") -> "Used":
        return Used(self.requests + other.requests, self.prompt_tokens + other.prompt_tokens, self.output_tokens + other.output_tokens)


@dataclass(slots=True)
class Report:
    """What a replica tells of one tenant, or is told of all other replicas together."""

    in_flight: int = 0
    requests: int = 0
    """Taken from the bucket of requests since the replica started."""
    tokens: int = 0
    """Taken from the bucket of tokens, estimates of running requests among them, so it may also shrink a little."""


class Bucket:
    def __init__(self, per_min: int, now: float) -> None:
        self._capacity = float(per_min)
        self._level = float(per_min)
        self._at = now

    def resize(self, per_min: int, now: float) -> None:
        """Another limit: what was used stays used."""
        if per_min != self._capacity:
            self._fill(now)
            self._level += per_min - self._capacity
            self._capacity = float(per_min)

    def take(self, amount: float, now: float) -> None:
        """Negative amounts give back."""
        self._fill(now)
        self._level = min(self._capacity, self._level - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """How long until this much is there; 0 where it is. What exceeds the whole bucket is admitted from a full one."""
        self._fill(now)
        missing = min(amount, self._capacity) - self._level
        return missing * _MINUTE_S / self._capacity if missing > _ROUNDING else 0.0

    @property
    def left(self) -> int:
        return max(0, math.floor(self._level))

    def _fill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + max(0.0, now - self._at) * self._capacity / _MINUTE_S)
        self._at = max(self._at, now)


@dataclass(slots=True)
class Grant:
    """An admitted request. Ends in `Accounts.settle`, whatever becomes of it."""

    tenant: str
    estimate: int
    priority: int = 0
    """The engine's: the smaller, the sooner."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_settled: bool = False


@dataclass(slots=True)
class _Account:
    requests: Bucket | None = None
    tokens: Bucket | None = None
    own: Report = field(default_factory=Report)
    others: Report = field(default_factory=Report)
    has_learned: bool = False


class Accounts:
    def __init__(self, clock: Callable[[], float], today: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._today = today
        self._accounts: dict[str, _Account] = {}
        self.used: dict[str, dict[str, Used]] = {}
        """By day of UTC and tenant, since this replica started."""
        self._budgets: dict[str, dict[str, Used]] = {}
        """By tenant and period (a day, a month, `ever`): what all others have used, and this replica before it started."""

    def admit(self, tenant: str, policy: TenantPolicy, estimate: int) -> Grant:
        """Takes the request into the account. RefusalError: 429 with the time to wait."""
        now = self._clock()
        account = self._account(tenant, policy, now)
        in_flight = account.own.in_flight + account.others.in_flight
        if policy.max_concurrent is not None and in_flight >= policy.max_concurrent:
            raise too_many(
                f"{in_flight} requests of {tenant} are in flight; {policy.max_concurrent} are allowed (max_concurrent). "
                f"Wait for one to end.",
                "concurrency_limit_exceeded",
                _CONCURRENCY_RETRY_S,
            )
        if account.requests is not None and (wait_s := account.requests.wait_s(1, now)):
            raise too_many(
                f"{tenant} has used its {policy.requests_per_min} requests a minute (requests_per_min).", "rate_limit_exceeded", wait_s
            )
        if account.tokens is not None and (wait_s := account.tokens.wait_s(estimate, now)):
            raise too_many(
                f"{tenant} has {account.tokens.left} of its {policy.tokens_per_min} tokens a minute left (tokens_per_min); "
                f"this request may take {estimate}.",
                "rate_limit_exceeded",
                wait_s,
            )
        self._check_budget(tenant, policy.token_budget)
        account.own.in_flight += 1
        account.own.requests += 1
        account.own.tokens += estimate
        if account.requests is not None:
            account.requests.take(1, now)
        if account.tokens is not None:
            account.tokens.take(estimate, now)
        return Grant(tenant, estimate)

    def settle(self, grant: Grant) -> None:
        """The request ended: the engine's counts take the estimate's place."""
        if grant.is_settled:
            return
        grant.is_settled = True
        account = self._accounts[grant.tenant]
        account.own.in_flight -= 1
        correction = grant.prompt_tokens + grant.output_tokens - grant.estimate
        account.own.tokens += correction
        if account.tokens is not None:
            account.tokens.take(correction, self._clock())
        self.count(grant)

    def count(self, grant: Grant) -> None:
        """Into the usage and the budgets alone, as for the rows of a batch."""
        day = self.used.setdefault(f"{self._today():%Y-%m-%d}", {})
        day[grant.tenant] = day.get(grant.tenant, Used()) + Used(1, grant.prompt_tokens, grant.output_tokens)

    def check_budget(self, tenant: str, policy: TenantPolicy) -> None:
        self._check_budget(tenant, policy.token_budget)

    def spent(self, tenant: str, per: str) -> Used:
        """What the tenant has used in the running day, month or ever, on all replicas."""
        period = period_key(per, self._today())
        own = [used.get(tenant, Used()) for day, used in self.used.items() if per == "ever" or day.startswith(period)]
        return sum(own, self._budgets.get(tenant, {}).get(period, Used()))

    def in_flight(self, tenant: str) -> int:
        account = self._accounts.get(tenant)
        return 0 if account is None else account.own.in_flight + account.others.in_flight

    def tenants(self) -> list[str]:
        return sorted({*self._accounts, *self._budgets, *(tenant for used in self.used.values() for tenant in used)})

    # the ledger's side

    def report(self) -> dict[str, Report]:
        return {
            tenant: Report(account.own.in_flight, account.own.requests, account.own.tokens) for tenant, account in self._accounts.items()
        }

    def learn(self, others: dict[str, Report], budgets: dict[str, dict[str, Used]]) -> None:
        """The sums of all other replicas' reports, and of their usage by tenant and period."""
        now = self._clock()
        for tenant in others.keys() | self._accounts.keys():
            account = self._accounts.setdefault(tenant, _Account())
            told = others.get(tenant, Report())
            # The first report is where others stand, not what they have just used; and a replica that left takes its counts along:
            # what it had used is not given back.
            if account.has_learned and told.requests >= account.others.requests:
                if account.requests is not None:
                    account.requests.take(told.requests - account.others.requests, now)
                if account.tokens is not None:
                    account.tokens.take(told.tokens - account.others.tokens, now)
            account.others = told
            account.has_learned = True
        self._budgets = budgets

    def _account(self, tenant: str, policy: TenantPolicy, now: float) -> _Account:
        account = self._accounts.setdefault(tenant, _Account())
        account.requests = _resized(account.requests, policy.requests_per_min, now)
        account.tokens = _resized(account.tokens, policy.tokens_per_min, now)
        return account

    def _check_budget(self, tenant: str, budget: Budget | None) -> None:
        if budget is None:
            return
        spent = self.spent(tenant, budget.per).tokens
        if spent >= budget.tokens:
            now = self._today()
            period = "" if budget.per == "ever" else f" of this {budget.per}"
            raise too_many(
                f"{tenant} has used {spent} tokens{period}; its budget is {budget.tokens} (token_budget).",
                "insufficient_quota",
                None if budget.per == "ever" else (period_end(budget.per, now) - now).total_seconds(),
            )


def too_many(message: str, code: str, retry_after_s: float | None) -> RefusalError:
    seconds = None if retry_after_s is None else max(1, math.ceil(retry_after_s))
    hint = "" if seconds is None else f" Try again in {seconds} s."
    return RefusalError(429, message + hint, code, retry_after_s=seconds)


def period_key(per: str, now: datetime) -> str:
    match per:
        case "day":
            return f"{now:%Y-%m-%d}"
        case "month":
            return f"{now:%Y-%m}"
        case _:
            return "ever"


def period_end(per: str, now: datetime) -> datetime:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        return midnight + timedelta(days=1)
    return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)


def _resized(bucket: Bucket | None, per_min: int | None, now: float) -> Bucket | None:
    if per_min is None:
        return None
    if bucket is None:
        return Bucket(per_min, now)
    bucket.resize(per_min, now)
    return bucket
