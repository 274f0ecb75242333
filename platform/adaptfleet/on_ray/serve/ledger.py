"""What replicas tell each other of their tenants' use: a small actor, asked a few times a second and never on a request's path.

A replica reports counts that only grow and is told the sums of all others. The actor keeps nothing that a report does not bring again:
where it dies, the next replica that reports makes another, and until then each replica goes on with what it knew. Usage for budgets is also
written to the store every few seconds. What is lost when everything dies at once is the last seconds' usage.

Across replicas a limit is thus exact but for what the others admit within one exchange (`EXCHANGE_S`).
"""

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

from adaptfleet.contracts.errors import StoreError
from adaptfleet.on_ray.serve.accounts import Accounts, Report, Used
from adaptfleet.store.objects import Objects
from adaptfleet.store.usage import Counts, read_usage, write_usage

EXCHANGE_S = 0.5
_WRITE_S = 5.0
_READ_AGAIN_S = 60.0
_GONE_S = 5.0
_NAME = "adaptfleet-ledger"
_NAMESPACE = "adaptfleet"
_CLAIM_QUIET_S = 3.0
"""A new ledger first hears who holds what."""

log = logging.getLogger(__name__)


class Ledger:
    """One for a cluster. Runs as an actor; a plain class for tests."""

    def __init__(self, store_url: str) -> None:
        self._objects = Objects(store_url)
        self._reports: dict[str, tuple[float, dict[str, Report]]] = {}
        self._usage: dict[tuple[str, str], Counts] = {}
        """By day and replica."""
        self._dirty: set[tuple[str, str]] = set()
        self._read_at = float("-inf")
        self._written_at = 0.0
        self._keeping: asyncio.Task[None] | None = None
        self._claims: dict[str, tuple[str, float]] = {}
        self._born = time.monotonic()

    async def exchange(
        self, replica: str, reports: dict[str, Report], usage: dict[str, Counts], claims: tuple[str, ...] = ()
    ) -> tuple[dict[str, Report], dict[str, dict[str, Used]]]:
        """Takes a replica's report; returns what all others have in flight and have used, and everybody else's usage by period."""
        now = time.monotonic()
        self._reports[replica] = (now, reports)
        for name in claims:
            self._claims[name] = (replica, now)
        for gone in [name for name, (at, _) in self._reports.items() if now - at > _GONE_S]:
            del self._reports[gone]
        for day, counts in usage.items():
            if self._usage.get((day, replica)) != counts:
                self._usage[day, replica] = counts
                self._dirty.add((day, replica))
        is_first = self._keeping is None
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep(now))
        if is_first:
            await self.kept()  # the budgets of before; later on, a slow store holds nobody up
        others: dict[str, Report] = {}
        for name, (_, told) in self._reports.items():
            if name != replica:
                for tenant, report in told.items():
                    total = others.setdefault(tenant, Report())
                    total.in_flight += report.in_flight
                    total.requests += report.requests
                    total.tokens += report.tokens
        return others, self._periods(replica)

    async def kept(self) -> None:
        """Until what is being written and read is done."""
        if self._keeping is not None:
            await self._keeping

    async def claim(self, replica: str, name: str) -> bool:
        """Whether this piece of work is the replica's alone, as long as its exchanges go on and name it."""
        now = time.monotonic()
        holder = self._claims.get(name)
        if holder is None and now - self._born < _CLAIM_QUIET_S:
            return False
        if holder is not None and holder[0] != replica and now - holder[1] <= _GONE_S:
            return False
        self._claims[name] = (replica, now)
        return True

    async def release(self, replica: str, name: str) -> None:
        if self._claims.get(name, ("", 0.0))[0] == replica:
            del self._claims[name]

    def _periods(self, replica: str) -> dict[str, dict[str, Used]]:
        periods: dict[str, dict[str, Used]] = defaultdict(dict)
        for (day, counted_by), counts in self._usage.items():
            if counted_by == replica:
                continue
            for tenant, count in counts.items():
                for period in (day, day[:7], "ever"):
                    periods[tenant][period] = periods[tenant].get(period, Used()) + Used(*count)
        return dict(periods)

    async def _keep(self, now: float) -> None:
        """Writes what has changed; reads what other clusters on the same store, and earlier replicas, have written."""
        try:
            if self._dirty and now - self._written_at >= _WRITE_S:
                self._written_at = now
                for day, replica in sorted(self._dirty):
                    self._dirty.discard((day, replica))  # before: what is counted while it is written is written next time
                    try:
                        await asyncio.to_thread(write_usage, self._objects, day, replica, self._usage[day, replica])
                    except StoreError:
                        self._dirty.add((day, replica))
                        raise
            if now - self._read_at >= _READ_AGAIN_S:
                # All of it once; then what may still grow: this day's, and the last one's around midnight.
                today = datetime.now(UTC)
                days: list[str | None] = [None] if self._read_at < 0 else [f"{day:%Y-%m-%d}" for day in (today - timedelta(days=1), today)]
                self._read_at = now
                for wanted in days:
                    for key, counts in (await asyncio.to_thread(read_usage, self._objects, wanted)).items():
                        if key not in self._dirty and key[1] not in self._reports:
                            self._usage[key] = counts
        except StoreError as error:
            log.error("usage is not kept for now: %s", error)


class Exchange:
    """A replica's side: tells the ledger and learns from it, in the background."""

    def __init__(self, accounts: Accounts, store_url: str) -> None:
        self.replica = uuid.uuid4().hex
        self._accounts = accounts
        self._store_url = store_url
        self._actor: Any = None
        self._task: asyncio.Task[None] | None = None
        self.claims: set[str] = set()

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._forever())

    async def once(self) -> None:
        usage = {
            day: {tenant: (used.requests, used.prompt_tokens, used.output_tokens) for tenant, used in counts.items()}
            for day, counts in self._accounts.used.items()
        }
        others, budgets = await self._ledger().exchange.remote(self.replica, self._accounts.report(), usage, tuple(self.claims))
        self._accounts.learn(others, budgets)

    async def claim(self, name: str) -> bool:
        """Whether the named work is this replica's to do. False too while no ledger can be reached."""
        import ray

        try:
            mine: bool = await self._ledger().claim.remote(self.replica, name)
        except ray.exceptions.RayError:
            self._actor = None
            return False
        if mine:
            self.claims.add(name)
        return mine

    async def release(self, name: str) -> None:
        import ray

        self.claims.discard(name)
        try:
            await self._ledger().release.remote(self.replica, name)
        except ray.exceptions.RayError:
            self._actor = None  # it forgets by itself what is no longer reported

    def _ledger(self) -> Any:
        if self._actor is None:
            import ray

            options = {"name": _NAME, "namespace": _NAMESPACE, "get_if_exists": True, "num_cpus": 0, "max_concurrency": 100}
            self._actor = ray.remote(Ledger).options(**options).remote(self._store_url)
        return self._actor

    async def _forever(self) -> None:
        import ray

        while True:
            try:
                await self.once()
            except ray.exceptions.RayError as error:
                log.warning("the ledger is away, this replica counts alone until the next: %s", type(error).__name__)
                self._actor = None
            except Exception:
                log.exception("an exchange with the ledger failed")
                self._actor = None
            await asyncio.sleep(EXCHANGE_S)
