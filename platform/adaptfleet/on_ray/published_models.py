"""Models of the registry as bases: a merged or compressed checkpoint is trained on and served like any other."""

from pathlib import Path

from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.model import EMBEDDED_MODELS, ModelSpec
from adaptfleet.contracts.names import Reference
from adaptfleet.store.registry import Registry


def at_hand(spec: ModelSpec, registry: Registry | None = None) -> ModelSpec:
    """The same spec with a published model's reference (`name`, `name@3`, `name@canary`) replaced by the local folder of its files.

    Embedded names, folders and hub ids stay as they are. ModelError: what is published under the name is no model.
    """
    source = spec.source
    if source in EMBEDDED_MODELS or "/" in source or Path(source).exists():
        return spec
    registry = registry or Registry.open()
    try:
        reference = Reference.parse(source)
    except ContractError:
        return spec
    if reference.name not in registry.snapshot():
        return spec
    manifest = registry.resolve(reference)
    if manifest.kind != "model":
        raise ModelError(
            f"model.source {source!r} is {manifest.reference} of the registry, which is of the kind {manifest.kind}, "
            "not a model. Publish a merged one (publish.merged=true), or name its base."
        )
    return spec.model_copy(update={"source": str(registry.fetch(manifest, home() / "cache" / "artifacts"))})
