"""Models of the registry as bases: a merged or compressed checkpoint is trained on and served like any other."""

from pathlib import Path

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.model import EMBEDDED_MODELS, ModelSpec
from adaptfleet.contracts.names import Reference
from adaptfleet.store.registry import Registry


def at_hand(spec: ModelSpec, registry: Registry | None = None) -> ModelSpec:
    """The same spec with a published model's reference (`name`, `name@3`, `name@canary`) replaced by the local folder of its files.

    Embedded names, folders and hub ids stay as they are. ModelError: what is published under the name is no model.
    """
    if not _may_be_published(spec.source):
        return spec
    registry = registry or Registry.open()
    manifest = _published(spec, registry)
    if manifest is None:
        return spec
    return spec.model_copy(update={"source": str(registry.fetch(manifest, home() / "cache" / "artifacts"))})


def adapters_taken(spec: ModelSpec, registry: Registry) -> frozenset[str]:
    """Revisions, beside the model's own, whose adapters it serves too: of the base that a published model is with rounded weights."""
    manifest = _published(spec, registry)
    return frozenset([manifest.serves_adapters_of]) if manifest and manifest.serves_adapters_of else frozenset()


def _may_be_published(source: str) -> bool:
    return source not in EMBEDDED_MODELS and "/" not in source and not Path(source).exists()


def _published(spec: ModelSpec, registry: Registry) -> Manifest | None:
    """The model that the source refers to; None where it is none of the registry's."""
    if not _may_be_published(spec.source):
        return None
    try:
        reference = Reference.parse(spec.source)
    except ContractError:
        return None
    if reference.name not in registry.snapshot():
        return None
    manifest = registry.resolve(reference)
    if manifest.kind != "model":
        raise ModelError(
            f"model.source {spec.source!r} is {manifest.reference} of the registry, which is of the kind {manifest.kind}, "
            "not a model. Publish a merged one (publish.merged=true), or name its base."
        )
    return manifest
