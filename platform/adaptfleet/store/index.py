"""What is published: one listing of the index gives names, versions and aliases. Records are immutable, so each is read once."""

import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adaptfleet.contracts.errors import NotFoundError
from adaptfleet.contracts.names import near
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import (
    CHANGES_KEY,
    AliasMove,
    Publication,
    R,
    alias_key,
    from_bytes,
    index_prefix,
    version_key,
)

_VERSION = re.compile(r"index/([^/]+)/(versions|removed)/(\d+)\.json")
_MOVE = re.compile(r"index/([^/]+)/aliases/([^/]+)/(\d+)\.json")
SNAPSHOT_MAX_AGE_S = 30.0
"""A publisher killed between its record and the token is seen at the latest after so long."""
_KEPT_RECORDS = 20_000


@dataclass(frozen=True)
class Listing:
    """One name: its versions, ascending, and where its aliases point."""

    name: str
    versions: tuple[int, ...]
    aliases: Mapping[str, int]
    last_claimed: int = 0
    """The highest number ever given out, removed versions included."""


@dataclass(frozen=True)
class _Keys:
    """The index of one name as listed, before any record is read."""

    claimed: frozenset[int]
    removed: frozenset[int]
    moves: Mapping[str, int]


class Index:
    """Reads the index. Safe between threads."""

    def __init__(self, objects: Objects):
        self._objects = objects
        self._records: dict[str, AliasMove | Publication] = {}
        self._snapshot: tuple[bytes | None, float, dict[str, Listing]] | None = None
        self._lock = threading.Lock()

    def listing(self, name: str) -> Listing:
        """The name as it stands now: one listing request, and a read for each alias moved since the last time."""
        keys = _keys(info.key for info in self._objects.list(index_prefix(name)))
        return self._listing(name, keys.get(name, _Keys(frozenset(), frozenset(), {})))

    def snapshot(self) -> Mapping[str, Listing]:
        """Every name that has a version. While nothing changes this reads one small object, so that it may be polled."""
        token = self._objects.get(CHANGES_KEY)  # before the listing: a change in between gives another token next time
        with self._lock:
            held = self._snapshot
        if held is not None and held[0] == token and time.monotonic() - held[1] < SNAPSHOT_MAX_AGE_S:
            return held[2]
        keys = _keys(info.key for info in self._objects.list(index_prefix()))
        listings = {name: self._listing(name, keys[name]) for name in sorted(keys)}
        published = {name: listing for name, listing in listings.items() if listing.versions}
        with self._lock:
            self._snapshot = (token, time.monotonic(), published)
        return published

    def announce(self) -> None:
        """Tells polling readers that something changed. Called after the change is visible."""
        self._objects.put(CHANGES_KEY, uuid.uuid4().hex.encode())

    def publication(self, name: str, version: int) -> Publication:
        """The record of a version. NotFoundError where the number was never claimed."""
        record = self._record(Publication, version_key(name, version))
        if record is None:
            raise NotFoundError(f"{name}@{version} was never published.")
        return record

    def move(self, name: str, alias: str) -> tuple[int, AliasMove | None]:
        """The number and the record of the alias's latest move; (0, None) where it never moved."""
        keys = _keys(info.key for info in self._objects.list(f"{index_prefix(name)}/aliases/{alias}"))
        number = keys[name].moves.get(alias, 0) if name in keys else 0
        return number, self._record(AliasMove, alias_key(name, alias, number)) if number else None

    def missing(self, name: str) -> NotFoundError:
        known = list(self.snapshot())
        listed = f" Published: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}." if known else " Nothing is published yet."
        return NotFoundError(f"nothing is published under the name {name!r}.{near(name, known)}{listed}")

    def _listing(self, name: str, keys: _Keys) -> Listing:
        aliases: dict[str, int] = {}
        for alias, number in sorted(keys.moves.items()):
            move = self._record(AliasMove, alias_key(name, alias, number))
            if move is not None and move.version is not None:
                aliases[alias] = move.version
        # A listing is no snapshot: an alias seen at its end may point to a version claimed after the listing had passed the versions.
        claimed = keys.claimed | frozenset(aliases.values())
        return Listing(name, tuple(sorted(claimed - keys.removed)), aliases, max(claimed | keys.removed, default=0))

    def _record(self, kind: type[R], key: str) -> R | None:
        with self._lock:
            held = self._records.get(key)
        if isinstance(held, kind):
            return held
        content = self._objects.get(key)
        if content is None:
            return None
        record = from_bytes(kind, key, content)
        if isinstance(record, (AliasMove, Publication)):
            with self._lock:
                if len(self._records) >= _KEPT_RECORDS:
                    self._records.clear()
                self._records[key] = record
        return record


def _keys(paths: Iterable[str]) -> dict[str, _Keys]:
    """Sorts the index's keys by name. What is no record of ours, such as a writer's staging file, is passed over."""
    claimed: dict[str, set[int]] = defaultdict(set)
    removed: dict[str, set[int]] = defaultdict(set)
    moves: dict[str, dict[str, int]] = defaultdict(dict)
    for path in paths:
        if match := _VERSION.fullmatch(path):
            (claimed if match[2] == "versions" else removed)[match[1]].add(int(match[3]))
        elif match := _MOVE.fullmatch(path):
            moves[match[1]][match[2]] = max(moves[match[1]].get(match[2], 0), int(match[3]))
    names = claimed.keys() | removed.keys() | moves.keys()
    return {name: _Keys(frozenset(claimed[name]), frozenset(removed[name]), moves[name]) for name in names}
