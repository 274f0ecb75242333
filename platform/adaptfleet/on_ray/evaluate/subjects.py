"""From what a contract names to what can be scored: references resolved, files fetched, bases checked, endpoints reached."""

from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import AdaptfleetError, ContractError, ModelError
from adaptfleet.contracts.evaluating import BaseSubject, EndpointSubject, EvaluateJob, FolderSubject, PublishedSubject, Subject
from adaptfleet.contracts.home import home
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.methods.bottleneck import CONFIG as BOTTLENECK_CONFIG
from adaptfleet.core.models.loading import base_revision, resolve_model_folder
from adaptfleet.on_ray.evaluate.endpoint import check_endpoint
from adaptfleet.on_ray.published_models import adapters_taken, at_hand
from adaptfleet.store.registry import Registry


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint to load, and an adapter to put on it."""

    model: ModelSpec
    adapter: Path | None = None


@dataclass(frozen=True)
class Resolved:
    label: str
    """A version rather than the alias that was asked for."""
    target: LocalModel | EndpointSubject
    manifest: Manifest | None = None
    """Published subjects: the version the result is recorded beside."""


def resolve_subjects(job: EvaluateJob, registry: Registry) -> list[Resolved]:
    """Every subject, before any is loaded. One error lists all that cannot be scored."""
    resolved: list[Resolved] = []
    offenders: list[AdaptfleetError] = []
    for subject in job.subjects:
        try:
            resolved.append(_resolve(subject, job.model, registry))
        except AdaptfleetError as error:
            offenders.append(error)
    if offenders:
        raise type(offenders[0])("\n".join(map(str, offenders)))
    labels = [subject.label for subject in resolved]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ContractError(f"subjects: {', '.join(twice)} is named more than once, by its version and by an alias; name each once.")
    return resolved


def _resolve(subject: Subject, base: ModelSpec, registry: Registry) -> Resolved:
    also = adapters_taken(base, registry)
    base = at_hand(base, registry)
    match subject:
        case BaseSubject():
            resolve_model_folder(base)
            return Resolved(subject.label(), LocalModel(base))
        case PublishedSubject():
            return _published(registry, subject.reference, base, also)
        case FolderSubject():
            return _folder(subject, base)
        case EndpointSubject():
            check_endpoint(subject)
            return Resolved(subject.label(), subject)
        case _:
            assert_never(subject)


def _published(registry: Registry, reference: str, base: ModelSpec, also: frozenset[str]) -> Resolved:
    """`also`: as `adapters_taken` gives it."""
    manifest = registry.resolve(reference)
    if manifest.kind == "dataset":
        raise ContractError(f"{manifest.reference} is a data set, not a model. Score a model on it: data.train={manifest.reference}.")
    if manifest.kind == "adapter":
        revision = base_revision(resolve_model_folder(base))
        if manifest.base_revision not in {revision, *also}:
            raise ModelError(
                f"{manifest.reference} was trained on {manifest.base} of the revision {str(manifest.base_revision)[:16]}, but model.source "
                f"{base.source!r} has the revision {revision[:16]}. Give its own base: --set model.source=..."
            )
    folder = registry.fetch(manifest, home() / "cache" / "artifacts")
    target = LocalModel(base, folder) if manifest.kind == "adapter" else LocalModel(base.model_copy(update={"source": str(folder)}))
    return Resolved(manifest.reference, target, manifest)


def _folder(subject: FolderSubject, base: ModelSpec) -> Resolved:
    folder = Path(subject.path).expanduser().absolute()
    if not folder.is_dir():
        raise ContractError(f"{subject.path} is no folder. Give a checkpoint's or an adapter's folder.")
    if any((folder / config).is_file() for config in ("adapter_config.json", BOTTLENECK_CONFIG)):
        resolve_model_folder(base)
        return Resolved(subject.label(), LocalModel(base, folder))
    checkpoint = base.model_copy(update={"source": str(folder)})
    resolve_model_folder(checkpoint)
    return Resolved(subject.label(), LocalModel(checkpoint))
