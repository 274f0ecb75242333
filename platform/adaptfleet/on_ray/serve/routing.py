"""Which replica a request goes to. Pure: no clock, no Ray; the router (`router.py`) and the simulator ask the same policy.

A request goes to a replica that holds its adapter, unless that replica carries much more than its share: then the adapter spreads to the
next replica of its own order, and comes to be held there too. Among holders, the one that last answered the same beginning of a prompt is
taken, since its prefix cache has it. An adapter nobody holds goes to the first replica of its order, which is the same for every router
without a word between them (rendezvous hashing): a replica that comes or goes moves only the adapters that it gains or loses.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHARE = 1.25
"""A replica may carry this many times its share of all requests before its adapters spread (bounded loads, arXiv 1608.01350)."""
SLACK = 4
"""Requests above its share that never count as too many: at few requests, chance alone is worse than a shared batch."""
PREFIXES_KEPT = 8192
MIN_STAY_S = 0.5
"""A request counts for so long at least."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known of a replica when a request comes."""

    id: str
    load: int
    """Requests it has, with those sent since it last reported."""
    adapters: frozenset[str] = frozenset()
    """Names (without version) of adapters in its engine."""
    is_taking: bool = True
    """False: it said that it drains, stalls or has no room; taken only where nobody else is left."""


@dataclass(frozen=True, slots=True)
class Wanted:
    adapter: str | None
    """Name without version. None: the base, or not known."""
    prefixes: tuple[int, ...] = ()
    """Hashes of ever longer beginnings of the prompt, the shortest first."""
    avoided: frozenset[str] = frozenset()
    """Replicas that failed this request; taken only where nobody else is left."""


def choose(wanted: Wanted, replicas: Sequence[Replica], recent: "RecentPrefixes") -> Replica:
    """The replica to take; `replicas` is not empty. `recent` learns of the choice."""
    taking = [replica for replica in replicas if replica.is_taking and replica.id not in wanted.avoided] or list(replicas)
    bound = most(sum(replica.load for replica in taking) + 1, len(taking))
    free = [replica for replica in taking if replica.load < bound] or taking
    order = _order(wanted, free)
    holders = [replica for replica in order if wanted.adapter in replica.adapters] if wanted.adapter is not None else order
    chosen = recent.latest(wanted.prefixes, holders) or _first(wanted, holders or order)
    recent.learn(wanted.prefixes, chosen.id)
    return chosen


def still_there(sent: Sequence[float], told_at: float, stay_s: float, now: float) -> list[float]:
    """Of requests sent at these times, those that a replica has and has not told of: sent after its last report, and, where requests stay
    `stay_s` on average (0: not known), not so long ago that most of them have left meanwhile. Times in seconds."""
    since = max(told_at, now - max(2 * stay_s, MIN_STAY_S)) if stay_s else told_at
    return [at for at in sent if at > since]


def most(num_requests: int, num_replicas: int) -> float:
    """How many of these requests one replica may have."""
    share = num_requests / num_replicas
    return max(SHARE * share, share + SLACK)


def _first(wanted: Wanted, candidates: Sequence[Replica]) -> Replica:
    """Of holders, and of replicas to hold an adapter from now on, the first of the adapter's order; for the base the least loaded."""
    return candidates[0] if wanted.adapter is not None else min(candidates, key=lambda replica: replica.load)


def _order(wanted: Wanted, replicas: Iterable[Replica]) -> list[Replica]:
    key = wanted.adapter or str(wanted.prefixes[:1])
    return sorted(replicas, key=lambda replica: hashlib.blake2b(f"{key}\0{replica.id}".encode(), digest_size=8).digest())


class RecentPrefixes:
    """Which replica last had a prompt's beginning. The oldest are forgotten."""

    def __init__(self, kept: int = PREFIXES_KEPT) -> None:
        self._kept = kept
        self._replicas: OrderedDict[int, str] = OrderedDict()

    def latest(self, prefixes: Sequence[int], candidates: Sequence[Replica]) -> Replica | None:
        """The candidate that had the longest of them."""
        by_id = {replica.id: replica for replica in candidates}
        for prefix in reversed(prefixes):
            found = by_id.get(self._replicas.get(prefix, ""))
            if found is not None:
                return found
        return None

    def learn(self, prefixes: Sequence[int], replica: str) -> None:
        for prefix in prefixes:
            self._replicas[prefix] = replica
            self._replicas.move_to_end(prefix)
        while len(self._replicas) > self._kept:
            self._replicas.popitem(last=False)


BLOCK_CHARS = 256
MAX_BLOCKS = 32


def prefixes(model: str, text: str) -> tuple[int, ...]:
    """One hash for each whole block of the beginning. Shorter prompts than one block are not worth remembering."""
    state = hashlib.blake2b(model.encode("utf-8", "replace"), digest_size=8)
    hashes = []
    for start in range(0, min(len(text), MAX_BLOCKS * BLOCK_CHARS) - BLOCK_CHARS + 1, BLOCK_CHARS):
        state.update(text[start : start + BLOCK_CHARS].encode("utf-8", "replace"))
        hashes.append(int.from_bytes(state.digest(), "big"))
    return tuple(hashes)
