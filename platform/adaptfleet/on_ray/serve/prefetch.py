"""What is published is fetched before anybody asks for it, and pinned adapters follow their alias `prod`."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from adaptfleet.contracts.errors import StoreError
from adaptfleet.contracts.names import DEFAULT_ALIAS
from adaptfleet.on_ray.serve.adapters import Adapters
from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.store.index import Listing
from adaptfleet.store.registry import Registry

_LOOK_S = 0.5
_MOST_AT_ONCE = 32
"""A store that is filled in one go is not to be copied to every replica; what is asked for comes on demand."""

log = logging.getLogger(__name__)


class Prefetch:
    def __init__(self, registry: Registry, catalog: Catalog, adapters: Adapters, pinned: Sequence[str]) -> None:
        self._registry = registry
        self._catalog = catalog
        self._adapters = adapters
        self._pinned = frozenset(pinned)
        self._known: frozenset[tuple[str, int]] = frozenset()

    async def pin(self) -> None:
        """What is pinned and published, before the first request. What is not there yet is pinned when it is published."""
        view = await self._view() or {}
        self._known = _versions(view)
        await self._pin(view)

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            view = await self._view()
            if view is None:
                continue
            versions = _versions(view)
            new, self._known = sorted(versions - self._known), versions
            for name, version in new if len(new) <= _MOST_AT_ONCE else ():
                await self._quietly(f"{name}@{version}", is_pinned=False)
            await self._pin(view)

    async def _pin(self, view: Mapping[str, Listing]) -> None:
        for name in sorted(self._pinned & view.keys()):
            version = view[name].aliases.get(DEFAULT_ALIAS)
            if version is not None:
                await self._quietly(f"{name}@{version}", is_pinned=True)

    async def _quietly(self, reference: str, is_pinned: bool) -> None:
        """Nobody waits for this: what cannot be served is told to whoever asks for it."""
        try:
            served = await self._catalog.find(f"{self._catalog.base_id}:{reference}")
            if served.adapter is not None:
                await (self._adapters.pin(served.adapter) if is_pinned else self._adapters.fetched(served.adapter))
        except RefusalError as refusal:
            log.info("%s is not fetched ahead: %s", reference, refusal.message)

    async def _view(self) -> Mapping[str, Listing] | None:
        try:
            return await asyncio.to_thread(self._registry.snapshot)
        except StoreError as error:
            log.error("the registry cannot be read: %s", error)
            return None


def _versions(view: Mapping[str, Listing]) -> frozenset[tuple[str, int]]:
    return frozenset((name, version) for name, listing in view.items() for version in listing.versions)
