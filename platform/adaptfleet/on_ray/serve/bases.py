"""The bases of one endpoint: what each is called, and whose adapters it takes.

Every process that resolves model ids (each engine's replica, the gateway) asks the same of the same bases in the same order, so that all
come to the same base.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from adaptfleet.contracts.errors import StoreError
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.names import DEFAULT_ALIAS
from adaptfleet.contracts.serving import ServingSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedBase:
    id: str
    revision: str
    also: frozenset[str] = frozenset()
    """Further revisions whose adapters are served: of the base that this one is with rounded weights."""
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a spec says of a base, as far as the other bases' processes need to know. Unlike its replicas, it seldom changes."""

    id: str
    model: ModelSpec
    max_model_len: int


def offers(spec: ServingSpec) -> tuple[Offer, ...]:
    return tuple(Offer(base.base_id(), base.model, base.max_model_len) for base in spec.bases())


def served_bases(offered: Sequence[Offer]) -> tuple[ServedBase, ...]:
    """With their revisions: fetches models that are not at hand yet. Imports torch. ModelError names what is missing."""
    from adaptfleet.core.models.loading import base_revision, resolve_model_folder
    from adaptfleet.on_ray.published_models import adapters_taken, at_hand
    from adaptfleet.store.registry import Registry

    registry = Registry.open()
    return tuple(
        ServedBase(
            offer.id,
            base_revision(resolve_model_folder(at_hand(offer.model, registry))),
            adapters_taken(offer.model, registry),
            offer.max_model_len,
        )
        for offer in offered
    )


def takers(bases: Sequence[ServedBase], revision: str | None) -> list[ServedBase]:
    """The bases that take adapters of this revision: first those that are it, then those that are it with rounded weights."""
    return [base for base in bases if base.revision == revision] + [
        base for base in bases if base.revision != revision and revision in base.also
    ]


def named_base(bases: Sequence[ServedBase], model: str) -> tuple[ServedBase | None, str]:
    """`base:name` in its two parts; None and the whole where no base is named so."""
    for base in bases:
        if model.startswith(f"{base.id}:"):
            return base, model.removeprefix(f"{base.id}:")
    return None, model


def deployment_name(base_id: str) -> str:
    """Of the Serve deployment of a base, where there are several."""
    return "endpoint-" + re.sub(r"[^A-Za-z0-9._-]", "_", base_id)


def strange_pins(bases: Sequence[ServingSpec]) -> list[str]:
    """A line for each pinned adapter that was trained on another base of the endpoint. Where the store cannot be read, none."""
    from adaptfleet.on_ray.published_models import adapters_taken
    from adaptfleet.store.registry import Registry

    # Adapters know their base by its source's name; here it may have another.
    owners = {name: base for base in reversed(bases) for name in (base.base_id(), ServingSpec(model=base.model).base_id())}
    found = []
    try:
        registry = Registry.open()
        view = registry.snapshot()
        for base in bases:
            for name in sorted(set(base.pinned) & view.keys()):
                version = view[name].aliases.get(DEFAULT_ALIAS)
                manifest = None if version is None else registry.manifest(name, version)
                owner = None if manifest is None or manifest.base is None else owners.get(manifest.base)
                if manifest is None or owner in (None, base) or manifest.base_revision in adapters_taken(base.model, registry):
                    continue
                assert owner is not None
                found.append(f"{manifest.reference} is pinned for {base.base_id()} and was trained on {owner.base_id()}. Pin it there.")
    except StoreError as error:
        log.warning("whether pinned adapters are their bases' is not known: %s", error)
    return found
