"""What is published: one listing of the index gives names, versions and aliases. Records are immutable, so each is read once."""

import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adaptfleet.contracts.errors import NotFoundError
from adaptfleet.contracts.names import near
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import (
    CHANGES_KEY,
    AliasMove,
    AliasSplit,
    Publication,
    R,
    alias_key,
    from_bytes,
    index_prefix,
    split_key,
    version_key,
)

_VERSION = re.compile(r"index/([^/]+)/(versions|removed)/(\d+)\.json")
_MOVE = re.compile(r"index/([^/]+)/(aliases|splits)/([^/]+)/(\d+)\.json")
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
    splits: Mapping[str, AliasSplit] = field(default_factory=dict)
    """Aliases that mean several versions now, or have a shadow."""


@dataclass(frozen=True)
class _Keys:
    """The index of one name as listed, before any record is read."""

    claimed: frozenset[int]
    removed: frozenset[int]
    moves: Mapping[str, int]
    splits: Mapping[str, int]


class Index:
    """Reads the index. Safe between threads."""

    def __init__(self, objects: Objects):
        self._objects = objects
        self._records: dict[str, AliasMove | AliasSplit | Publication] = {}
        self._snapshot: tuple[bytes | None, float, dict[str, Listing]] | None = None
        self._lock = threading.Lock()

    def listing(self, name: str) -> Listing:
        """The name as it stands now: one listing request, and a read for each alias moved since the last time."""
        keys = _keys(info.key for info in self._objects.list(index_prefix(name)))
        return self._listing(name, keys.get(name, _Keys(frozenset(), frozenset(), {}, {})))

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

    def split(self, name: str, alias: str) -> int:
        """The number of the alias's latest split; 0 where it never had one."""
        keys = _keys(info.key for info in self._objects.list(f"{index_prefix(name)}/splits/{alias}"))
        return keys[name].splits.get(alias, 0) if name in keys else 0

    def missing(self, name: str) -> NotFoundError:
        known = list(self.snapshot())
        listed = f" Published: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}." if known else " Nothing is published yet."
        return NotFoundError(f"nothing is published under the name {name!r}.{near(name, known)}{listed}")

    def _listing(self, name: str, keys: _Keys) -> Listing:
        aliases: dict[str, int] = {}
        splits: dict[str, AliasSplit] = {}
        for alias, number in sorted(keys.moves.items()):
            move = self._record(AliasMove, alias_key(name, alias, number))
            if move is None or move.version is None:
                continue
            aliases[alias] = move.version
            split = self._record(AliasSplit, split_key(name, alias, keys.splits[alias])) if alias in keys.splits else None
            if split is not None and split.on_move == move.move and split.versions:
                splits[alias] = split
        # A listing is no snapshot: an alias seen at its end may point to a version claimed after the listing had passed the versions.
        claimed = keys.claimed | frozenset(aliases.values())
        return Listing(name, tuple(sorted(claimed - keys.removed)), aliases, max(claimed | keys.removed, default=0), splits)

    def _record(self, kind: type[R], key: str) -> R | None:
        with self._lock:
            held = self._records.get(key)
        if isinstance(held, kind):
            return held
        content = self._objects.get(key)
        if content is None:
            return None
        record = from_bytes(kind, key, content)
        if isinstance(record, (AliasMove, AliasSplit, Publication)):
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
    splits: dict[str, dict[str, int]] = defaultdict(dict)
    for path in paths:
        if match := _VERSION.fullmatch(path):
            (claimed if match[2] == "versions" else removed)[match[1]].add(int(match[3]))
        elif match := _MOVE.fullmatch(path):
            latest = (moves if match[2] == "aliases" else splits)[match[1]]
            latest[match[3]] = max(latest.get(match[3], 0), int(match[4]))
    names = claimed.keys() | removed.keys() | moves.keys() | splits.keys()
    return {name: _Keys(frozenset(claimed[name]), frozenset(removed[name]), moves[name], splits[name]) for name in names}
