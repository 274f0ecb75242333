"""Aliases that mean several versions by weight. A split is one more record beside the alias's log, created whole under the next number.

It names the move of the alias that it stands on, and holds as long as that is the latest: a promotion, a rollback or a publication ends it
in the same step in which it moves the alias, also where a tool does it that knows nothing of splits.
"""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from adaptfleet.contracts.errors import ContractError, NotFoundError, StoreError
from adaptfleet.contracts.names import near
from adaptfleet.store.index import Index
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import AliasMove, AliasSplit, Share, from_bytes, split_key, to_bytes

_MAX_TRIES = 50


def split_alias(
    objects: Objects, index: Index, name: str, alias: str, weights: Mapping[int, float], shadow: int | None, shadow_percent: float
) -> AliasSplit:
    """ContractError or NotFoundError, all that is wrong at once, before anything is written."""
    listing = index.listing(name)
    if not listing.versions:
        raise index.missing(name)
    _, move = index.move(name, alias)
    if move is None or move.version is None:
        raise NotFoundError(f"{name} has no alias {alias!r}.{near(alias, listing.aliases)} Promote a version to it first.")
    wrong = [f"{name}@{version} does not exist" for version in sorted({*weights, *([shadow] if shadow else [])} - set(listing.versions))]
    wrong += [f"the weight of version {version} is {weight}, not above 0" for version, weight in weights.items() if not 0 < weight < 1e9]
    if weights and move.version not in weights:
        wrong.append(f"{alias} points to version {move.version}, which has no share. Give it one, or promote another version first")
    if len(weights) == 1 and shadow is None:
        wrong.append("one version alone is no split: `adaptfleet promote` points the alias at it")
    if not 0 < shadow_percent <= 100:
        wrong.append(f"the shadow's percent is {shadow_percent}, not above 0 and up to 100")
    if shadow is not None and shadow in (set(weights) or {move.version}):
        wrong.append(f"version {shadow} is to answer requests and to shadow them; one of both")
    if not weights and shadow is None:
        wrong.append("neither shares nor a shadow are given, such as 3=95 4=5")
    if wrong:
        raise ContractError(f"{name}@{alias} is not split: {'; '.join(wrong)}.")
    shares = tuple(Share(version=version, weight=float(weight)) for version, weight in sorted(weights.items()))
    return _append(
        objects, index, name, alias, move, shares, None if shadow is None else Share(version=shadow, weight=float(shadow_percent))
    )


def end_split(objects: Objects, index: Index, name: str, alias: str) -> None:
    """All requests go to the alias's own version again."""
    _, move = index.move(name, alias)
    if move is not None:
        _append(objects, index, name, alias, move, (), None)


def _append(
    objects: Objects, index: Index, name: str, alias: str, move: AliasMove, shares: tuple[Share, ...], shadow: Share | None
) -> AliasSplit:
    record = AliasSplit(on_move=move.move, shares=shares, shadow=shadow, made_at=datetime.now(UTC), split=uuid.uuid4().hex)
    for _ in range(_MAX_TRIES):
        key = split_key(name, alias, index.split(name, alias) + 1)
        if objects.put_new(key, to_bytes(record)) or _is_ours(objects, key, record.split):
            return record
    raise StoreError(f"the alias {alias!r} of {name} was split by others {_MAX_TRIES} times while this was tried. Try again.")


def _is_ours(objects: Objects, key: str, token: str) -> bool:
    """True where a retried request finds the record that its lost first attempt had already written."""
    content = objects.get(key)
    return content is not None and from_bytes(AliasSplit, key, content).split == token
