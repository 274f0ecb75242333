"""KubeRay's CRDs as strict JSON schemas, and their CEL rules.

The API server prunes fields that a CRD does not know; with strict validation it refuses them. That is done here: each object of a
structural schema that lists its properties is closed. Defaults are filled in first, because rules read them.
"""

import copy
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import yaml

from k8s.validation.manifests import ROOT, Document, Finding, name_of

VARIABLE = "KUBERAY_CRDS"
VERSION = "v1.7.0"
HOW_TO_FETCH = (
    f"git clone --depth 1 --branch {VERSION} https://github.com/ray-project/kuberay && "
    f"export {VARIABLE}=$PWD/kuberay/ray-operator/config/crd/bases"
)


def folder() -> Path | None:
    """Where the CRDs are: KUBERAY_CRDS, or beside the repository. None: nowhere."""
    place = Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "kuberay-crds" / VERSION)
    return place if any(place.glob("*rayclusters.yaml")) else None


class Crds:
    """The kinds of a folder of CRDs."""

    def __init__(self, place: Path) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}
        for file in sorted(place.glob("*.yaml")):
            crd = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
            for version in crd["spec"]["versions"]:
                api = f"{crd['spec']['group']}/{version['name']}"
                scope = crd["spec"]["scope"]
                self._kinds[api, crd["spec"]["names"]["kind"]] = _Kind(version["schema"]["openAPIV3Schema"], scope)

    def knows(self, document: Document) -> bool:
        return self._key(document) in self._kinds

    def is_namespaced(self, document: Document) -> bool:
        return self._kinds[self._key(document)].scope == "Namespaced"

    def findings(self, document: Document) -> Iterator[Finding]:
        yield from self._kinds[self._key(document)].findings(document)

    def with_defaults(self, document: Document) -> Document:
        return self._kinds[self._key(document)].with_defaults(document)

    @staticmethod
    def _key(document: Document) -> tuple[str, str]:
        return str(document.get("apiVersion")), str(document.get("kind"))


class _Kind:
    def __init__(self, schema: dict[str, Any], scope: str) -> None:
        self.scope = scope
        self._schema = schema
        self._rules = [(path, rule) for path, rule in _rules(schema) if "oldSelf" not in rule["rule"]]
        self._compiled: jsonschema.Draft202012Validator | None = None

    def with_defaults(self, document: Document) -> Document:
        filled = copy.deepcopy(document)
        _fill(self._schema, filled)
        return filled

    def findings(self, document: Document) -> Iterator[Finding]:
        self._compiled = self._compiled or jsonschema.Draft202012Validator(strict(self._schema))
        filled = self.with_defaults(document)
        name = name_of(document)
        for error in self._compiled.iter_errors(filled):
            yield Finding(f"{name} {error.json_path}", error.message[:300])
        for path, rule in self._rules:
            for value in _reached(filled, path):
                try:
                    holds = _program(rule["rule"]).execute({"self": value})
                except Exception as error:
                    holds = f"cannot be evaluated: {error}"
                if holds is not True:
                    yield Finding(f"{name} $.{'.'.join(path)}", rule.get("message") or f"the rule {rule['rule']!r} does not hold ({holds})")


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def strict(schema: Any) -> Any:
    """A structural schema as a JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        either: dict[str, Any] = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
        return either | ({"pattern": schema["pattern"]} if "pattern" in schema else {})
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: strict(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties"):
            made[key] = strict(value)
        elif key not in ("description", "format", "default", "nullable") and not key.startswith("x-"):
            made[key] = value
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    is_open = "additionalProperties" in made or schema.get("x-kubernetes-preserve-unknown-fields")
    if made.get("type") == "object" and "properties" in made and not is_open:
        made["additionalProperties"] = False
    return made


def _fill(schema: dict[str, Any], value: Any) -> None:
    """Defaults in, nulls out, in place."""
    if isinstance(value, dict):
        for key in [key for key, part in value.items() if part is None]:
            del value[key]
        for key, part in (schema.get("properties") or {}).items():
            if "default" in part and key not in value:
                value[key] = copy.deepcopy(part["default"])
            if key in value:
                _fill(part, value[key])
        others = schema.get("additionalProperties")
        if isinstance(others, dict):
            for part in value.values():
                _fill(others, part)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for part in value:
            _fill(schema["items"], part)


def _rules(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    for rule in schema.get("x-kubernetes-validations", []):
        yield path, rule
    for name, part in schema.get("properties", {}).items():
        yield from _rules(part, (*path, name))
    yield from _rules(schema.get("items"), (*path, "[]"))
    yield from _rules(schema.get("additionalProperties"), (*path, "{}"))


def _reached(value: Any, path: tuple[str, ...]) -> Iterator[Any]:
    """The values that a rule's path leads to."""
    if value is None:
        return
    if not path:
        yield value
        return
    head, rest = path[0], path[1:]
    parts = (
        value if head == "[]" else value.values() if head == "{}" else [value[head]] if isinstance(value, dict) and head in value else []
    )
    for part in parts or []:
        yield from _reached(part, rest)
