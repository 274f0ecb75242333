"""Movable aliases as an append-only log: move n+1 is created conditionally after move n, so two movers never overwrite each other.

A log needs nothing of a store but conditional creation, which local disks and every object store have, and it is the alias's history.
"""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from adaptfleet.contracts.errors import StoreError
from adaptfleet.store.index import Index
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import AliasMove, alias_key, from_bytes, to_bytes

_KEPT_HISTORY = 100
_MAX_TRIES = 200

Step = tuple[int | None, tuple[int, ...]]
"""Where the alias points next, and where it pointed before, the latest last."""
Move = Callable[[AliasMove | None], Step | None]
"""From the latest move (None: there was none) to the next step; None: there is nothing to move."""


def forward(version: int) -> Move:
    """Points the alias at `version`, wherever it points now."""

    def step(now: AliasMove | None) -> Step | None:
        if now is not None and now.version == version:
            return None
        return version, _history(now)

    return step


def not_back(version: int) -> Move:
    """What a publisher wants: its version, unless someone has moved the alias to a newer one since."""

    def step(now: AliasMove | None) -> Step | None:
        if now is not None and now.version is not None and now.version >= version:
            return None
        return version, _history(now)

    return step


def away(now: AliasMove | None) -> Step | None:
    """Takes the alias away."""
    return None if now is None or now.version is None else (None, _history(now))


def move_alias(objects: Objects, index: Index, name: str, alias: str, step: Move) -> AliasMove | None:
    """Appends the move that `step` makes of the present one, and tries again when another mover was faster. None: nothing to move."""
    token = uuid.uuid4().hex
    for _ in range(_MAX_TRIES):
        number, now = index.move(name, alias)
        wanted = step(now)
        if wanted is None:
            return now
        version, earlier = wanted
        record = AliasMove(version=version, earlier=earlier[-_KEPT_HISTORY:], moved_at=datetime.now(UTC), move=token)
        key = alias_key(name, alias, number + 1)
        if objects.put_new(key, to_bytes(record)) or _is_ours(objects, key, token):
            return record
    raise StoreError(f"the alias {alias!r} of {name} was moved by others {_MAX_TRIES} times while this move was tried. Try again.")


def _is_ours(objects: Objects, key: str, token: str) -> bool:
    """True where a retried request finds the record that its lost first attempt had already written."""
    content = objects.get(key)
    return content is not None and from_bytes(AliasMove, key, content).move == token


def _history(now: AliasMove | None) -> tuple[int, ...]:
    if now is None:
        return ()
    return now.earlier if now.version is None else (*now.earlier, now.version)
