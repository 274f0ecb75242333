"""Which model ids are served now: the bases, and the registry's adapters of these bases.

An id is a base's own, or `name`, `name@3`, `name@canary`, each also as `base:name...`, or a further name that stands for one of these. It
is looked up at each request in a view of the registry at most `VIEW_AGE_S` old: a newly published or promoted adapter needs no restart.

What a caller may not see is answered exactly as what does not exist, near matches and lists of names included.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import ContractError, NotFoundError, StoreError
from adaptfleet.contracts.names import DEFAULT_ALIAS, Reference, near
from adaptfleet.on_ray.serve.bases import ServedBase, named_base, takers
from adaptfleet.on_ray.serve.canary import is_shadowed, version_for
from adaptfleet.on_ray.serve.refusal import RefusalError, unfit_adapter, unknown_model
from adaptfleet.on_ray.serve.viewer import EVERYBODY, Viewer
from adaptfleet.store.index import Listing
from adaptfleet.store.records import AliasSplit
from adaptfleet.store.registry import Registry

VIEW_AGE_S = 0.25
_SHOWN_CHARS = 120
_RECORDS_AT_ONCE = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What one request is answered by."""

    requested: str
    """The id as the client wrote it, which the answer repeats."""
    canonical: str
    """`name@version`, or the base's id: unique for these weights, so that caches and metrics never mix two versions."""
    adapter: Manifest | None
    base: str
    """The id of the base whose engine answers."""
    shadow: Manifest | None = None
    """A version that shall get a copy of the request, whose answer goes nowhere."""


@dataclass(frozen=True, slots=True)
class Card:
    """An entry of `/v1/models`."""

    id: str
    created: int
    base: str
    """The id of its base; a base's own."""
    means: str = ""
    """What an alias stands for now, shortly."""


class Catalog:
    def __init__(self, registry: Registry, own: ServedBase, bases: Sequence[ServedBase] = ()) -> None:
        """`own`: of the engine that this catalog is for. `bases`: all of the endpoint, where there are several; the first answers where no
        model is named."""
        self.base_id = own.id
        self._registry = registry
        self._bases = tuple(bases) or (own,)
        self._by_id = {base.id: base for base in self._bases}
        self._view: Mapping[str, Listing] = {}
        self._view_until = 0.0
        self._refreshing = asyncio.Lock()

    async def find(self, model: object, viewer: Viewer = EVERYBODY) -> Served:
        """What answers to this id now. RefusalError: 404 with near matches, or 400 where the artifact is not an adapter of this base."""
        if model is None:
            model = self._bases[0].id
        if not isinstance(model, str):
            raise RefusalError(
                400, f"model is a {type(model).__name__}; it is a string such as {self._bases[0].id!r}.", "invalid_type", "model"
            )
        shown = model if len(model) <= _SHOWN_CHARS else model[:_SHOWN_CHARS] + "..."
        meant = viewer.aliases.get(model, model)
        if meant in self._by_id:
            if not viewer.may_see(meant):
                raise unknown_model(await self._unknown(shown, viewer))
            return Served(model, meant, None, meant)
        asked, name = named_base(self._bases, meant)
        try:
            reference = Reference.parse(name)
        except ContractError:
            raise unknown_model(await self._unknown(shown, viewer)) from None
        if not viewer.may_see(reference.name):
            raise unknown_model(await self._unknown(shown, viewer))
        listing = (await self._listings()).get(reference.name)
        alias = reference.alias or DEFAULT_ALIAS
        version = None if listing is None else (reference.version or listing.aliases.get(alias))
        if listing is None or version not in listing.versions:
            raise unknown_model(await self._unknown(shown, viewer))
        split = None if reference.version else listing.splits.get(alias)
        if split is not None and split.shares:
            version = version_for(split, reference.name, alias, viewer.user)
        manifest = await self._manifest(reference.name, version, shown, viewer)
        base = self._base_of(manifest, asked)
        shadow = None
        if split is not None and split.shadow is not None and is_shadowed(split, viewer.request_id):
            shadow = await self._shadow(reference.name, split.shadow.version)
        return Served(model, manifest.reference, manifest, base.id, shadow)

    async def _manifest(self, name: str, version: int, shown: str, viewer: Viewer) -> Manifest:
        try:
            return await asyncio.to_thread(self._registry.manifest, name, version)
        except NotFoundError:
            raise unknown_model(await self._unknown(shown, viewer)) from None
        except StoreError as error:
            log.error("the record of %s@%s cannot be read: %s", name, version, error)
            raise RefusalError(503, f"The record of {shown!r} cannot be read from the store now. Try again.", "store_unavailable") from None

    async def _shadow(self, name: str, version: int) -> Manifest | None:
        """What is wrong with a shadow never touches the request itself."""
        try:
            manifest = await asyncio.to_thread(self._registry.manifest, name, version)
            self._base_of(manifest)
            return manifest
        except (StoreError, RefusalError) as error:
            log.warning("the shadow %s@%s gets no copies: %s", name, version, error)
            return None

    async def cards(self, viewer: Viewer = EVERYBODY) -> list[Card]:
        """The bases, their published adapters by `name` (the alias prod), `name@alias` and `name@version`, and further names of these."""
        cards = [Card(base.id, int(time.time()), base.id) for base in self._bases if viewer.may_see(base.id)]
        visible = {name: listing for name, listing in (await self._listings()).items() if viewer.may_see(name)}
        served = await asyncio.to_thread(self._served, visible)
        for name, listing in visible.items():
            manifests = served[name]
            base_of = {version: takers(self._bases, manifest.base_revision)[0].id for version, manifest in manifests.items()}
            for alias, version in sorted(listing.aliases.items(), key=lambda item: (item[0] != DEFAULT_ALIAS, item[0])):
                if version in manifests:
                    known_as = name if alias == DEFAULT_ALIAS else f"{name}@{alias}"
                    cards.append(Card(known_as, int(manifests[version].created_at.timestamp()), base_of[version], f"v{version}"))
            cards += [
                Card(manifest.reference, int(manifest.created_at.timestamp()), base_of[version]) for version, manifest in manifests.items()
            ]
        known = {card.id: card for card in cards}
        further = [(name, *named_base(self._bases, meant)) for name, meant in viewer.aliases.items() if name not in known]
        return cards + [
            Card(name, known[meant].created, known[meant].base if asked is None else asked.id, meant)
            for name, asked, meant in further
            if meant in known
        ]

    @property
    def base_ids(self) -> list[str]:
        return list(self._by_id)

    def max_model_len(self, base_id: str) -> int | None:
        """In tokens, as the spec says; None: not known here."""
        return self._by_id[base_id].max_model_len

    async def splits(self, viewer: Viewer = EVERYBODY) -> dict[str, AliasSplit]:
        """Split aliases by the ids they are known as."""
        return {
            name if alias == DEFAULT_ALIAS else f"{name}@{alias}": split
            for name, listing in (await self._listings()).items()
            if viewer.may_see(name)
            for alias, split in listing.splits.items()
        }

    def _served(self, listings: Mapping[str, Listing]) -> dict[str, dict[int, Manifest]]:
        """The versions of each name that are adapters of these bases. Of a remote store, several records are on their way at once."""

        def read(name: str, version: int) -> Manifest | None:
            try:
                return self._registry.manifest(name, version)
            except StoreError as error:
                log.error("the record of %s@%s cannot be read: %s", name, version, error)
                return None

        served: dict[str, dict[int, Manifest]] = {name: {} for name in listings}
        versions = [(name, version) for name, listing in listings.items() for version in listing.versions]
        with ThreadPoolExecutor(_RECORDS_AT_ONCE) as pool:
            for manifest in pool.map(lambda of: read(*of), versions):
                if manifest is not None and manifest.kind == "adapter" and takers(self._bases, manifest.base_revision):
                    served[manifest.name][manifest.version] = manifest
        return served

    def _base_of(self, manifest: Manifest, asked: ServedBase | None = None) -> ServedBase:
        """The base that answers for the adapter: the one that was asked for, else the first that takes it. RefusalError: there is none."""
        if manifest.kind != "adapter":
            raise unfit_adapter(
                f"{manifest.reference} is a {manifest.kind}, not an adapter; this endpoint serves adapters.", "not_an_adapter"
            )
        taking = takers(self._bases, manifest.base_revision)
        if asked is not None and len(self._bases) > 1 and taking and asked not in taking:
            raise unfit_adapter(
                f"{manifest.reference} is an adapter of {' and '.join(base.id for base in taking)}, not of {asked.id}. "
                f"Ask for {manifest.name!r}.",
                "wrong_base",
            )
        if not taking:
            revision = (manifest.base_revision or "unknown")[:12]
            served = " and ".join(f"{base.id} of revision {base.revision[:12]}" for base in self._bases)
            raise unfit_adapter(
                f"{manifest.reference} was trained on {manifest.base} of revision {revision}; this endpoint serves {served}. "
                f"An adapter is served only on its own base.",
                "wrong_base",
            )
        return asked or taking[0]

    async def _unknown(self, shown: str, viewer: Viewer) -> str:
        known = [card.id for card in await self.cards(viewer)]
        listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        return f"The model {shown!r} does not exist.{near(named_base(self._bases, shown)[1], known)} Served: {listed}."

    async def _listings(self) -> Mapping[str, Listing]:
        """The last view is used on when the store cannot be reached: what is loaded stays served."""
        if time.monotonic() < self._view_until:
            return self._view
        async with self._refreshing:
            if time.monotonic() >= self._view_until:
                try:
                    self._view = await asyncio.to_thread(self._registry.snapshot)
                except StoreError as error:
                    log.error("the registry cannot be read, its last known state is used: %s", error)
                self._view_until = time.monotonic() + VIEW_AGE_S
        return self._view
