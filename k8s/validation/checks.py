"""All checks of one built folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from k8s.validation import (
    core_kinds,
    entrypoints,
    extension_kinds,
    fleet,
    operator_rules,
    operator_settings,
    pods,
    references,
    serve_config,
    versions,
)
from k8s.validation.crds import Crds
from k8s.validation.manifests import OVERLAYS, Document, Finding, build, name_of

_RAY = "ray.io/v1"


def check_folder(folder: Path, crds: Crds) -> list[Finding]:
    return check(build(folder), platform_of(folder), crds)


def platform_of(folder: Path) -> list[Document]:
    """What an overlay's jobs are sent to: the overlay itself, where the folder lies inside one."""
    above = folder.resolve().parent
    is_inside = above != OVERLAYS.resolve() and (above / "kustomization.yaml").is_file()
    return build(above) if is_inside else []


def check(documents: Sequence[Document], context: Sequence[Document], crds: Crds) -> list[Finding]:
    """What is wrong, all of it. A document that its schema refuses is not asked for more."""
    found: list[Finding] = []
    sound: list[Document] = []
    for document in documents:
        problems = list(_schema(document, crds))
        found += problems
        if not problems:
            sound.append(document)
    for number, document in enumerate(sound):
        found += _own(document, [*sound[:number], *sound[number + 1 :], *context])
    if len(sound) == len(documents):  # else what is missing may only be what its schema refused
        found += references.findings(sound, context, crds)
    return found


def _schema(document: Document, crds: Crds) -> Iterator[Finding]:
    missing = [key for key in ("apiVersion", "kind", "metadata") if not document.get(key)]
    if missing or not document["metadata"].get("name"):
        yield Finding(name_of(document), f"lacks {', '.join(missing) or 'metadata.name'}")
    elif crds.knows(document):
        yield from crds.findings(document)
        for pod in pods.pods(document):
            yield from core_kinds.pod_findings(name_of(document), pod.path, pod.template)
    elif extension_kinds.knows(document):
        yield from extension_kinds.findings(document)
    elif core_kinds.knows(document):
        yield from core_kinds.findings(document)
    else:
        yield Finding(name_of(document), f"no schema is known for {document['apiVersion']} {document['kind']}; is it misspelt?")


def _own(document: Document, others: list[Document]) -> Iterator[Finding]:
    if document["apiVersion"] == _RAY:
        yield from operator_rules.findings(document)
        yield from operator_settings.findings(document)
    if document["kind"] == "RayService":
        problems = list(serve_config.findings(document))
        yield from problems
        if problems:
            return
    yield from pods.findings(document)
    yield from versions.findings(document)
    yield from entrypoints.findings(document)
    yield from references.secret_findings(document)
    yield from fleet.findings(document, others)
    if document["kind"] == "RayService" and not str(document["metadata"].get("namespace", "")).endswith("-dev"):
        yield from pods.min_head_findings(document)
