"""Kubernetes' own kinds against their published schemas, with unknown fields refused."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from k8s.validation.manifests import Document, Finding, name_of

VERSION = "1.33"
CLUSTER_SCOPED = {"Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass"}
_FOLDER = f"kubernetes-json-schema/v{VERSION}.0-local-strict"


def knows(document: Document) -> bool:
    return _validator(document["apiVersion"], document["kind"]) is not None


def findings(document: Document) -> Iterator[Finding]:
    validator = _validator(document["apiVersion"], document["kind"])
    assert validator is not None
    for error in validator.iter_errors(document):
        # an alternative's own errors say more than that none of them fits
        for part in error.context or [error]:
            yield Finding(f"{name_of(document)} {part.json_path}", part.message[:300])


def pod_findings(name: str, path: str, template: Document) -> Iterator[Finding]:
    """A pod's template inside another kind, which may be looser about it: a CRD leaves out what Kubernetes itself checks in a pod."""
    validator = _validator("v1", "PodTemplate")
    assert validator is not None
    for error in validator.iter_errors({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}):
        yield Finding(f"{name} {error.json_path.replace('$.template', path)}", error.message[:300])


@cache
def _validator(api_version: str, kind: str) -> Any:
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    try:
        schema = schema_contents(f"{_FOLDER}/{kind.lower()}-{group}.json", VERSION)
    except FileNotFoundError:
        return None
    registry = Resource.from_contents(schema) @ Registry()
    registry = Resource.from_contents(_definitions()) @ registry
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def _definitions() -> Any:
    return schema_contents(f"{_FOLDER}/_definitions.json", VERSION)
