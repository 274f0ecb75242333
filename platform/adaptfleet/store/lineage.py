"""What an artifact was made from."""

from dataclasses import dataclass

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import ContractError, NotFoundError
from adaptfleet.store.registry import Registry

_MAX_DEPTH = 20


@dataclass(frozen=True)
class Ancestry:
    """A reference, its manifest where this registry holds it, and the same of its parents."""

    reference: str
    manifest: Manifest | None
    parents: tuple["Ancestry", ...]


def ancestry(registry: Registry, reference: str, depth: int = _MAX_DEPTH) -> Ancestry:
    """Follows `parents`. A parent outside this registry, such as a hub model or a removed version, stands by its name alone."""
    try:
        manifest = registry.resolve(reference)
    except (NotFoundError, ContractError):
        return Ancestry(reference, None, ())
    parents = tuple(ancestry(registry, parent, depth - 1) for parent in manifest.parents) if depth else ()
    return Ancestry(manifest.reference, manifest, parents)
