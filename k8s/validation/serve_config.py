"""`serveConfigV2`: Serve's schema with unknown keys refused, and the application's own contract.

Serve's models take a misspelt key without a word, and the value that was meant stays at its default.
"""

import importlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from k8s.validation.manifests import Document, Finding, name_of

_ARGS = {"ray_actor_options": "cpus_per_replica, gpus_per_replica", "autoscaling_config": "replicas", "num_replicas": "replicas"}


class _Unique(yaml.SafeLoader):
    """A key that is given twice is an error, not the last one's."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
    return dict(loader.construct_pairs(node, deep=True))


_Unique.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def findings(document: Document) -> Iterator[Finding]:
    where = f"{name_of(document)} spec.serveConfigV2"
    try:
        config = read(document)
    except yaml.YAMLError as error:
        yield Finding(where, f"is no YAML: {error}")
        return
    yield from config_findings(where, config)


def read(document: Document) -> Any:
    return yaml.load(document.get("spec", {}).get("serveConfigV2") or "", _Unique)


def config_findings(where: str, config: Any) -> Iterator[Finding]:
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(config, dict):
        yield Finding(where, "is no mapping; KubeRay hands it to Serve as it is")
        return
    problems = [
        Finding(f"{where} {path}", "Serve knows no such key, and would ignore it") for path in unknown_keys(ServeDeploySchema, config)
    ]
    for path, model, data in models_of(ServeDeploySchema, config):
        # Each part by its own model: where Serve takes a model or a mapping, the whole would take anything.
        problems += [Finding(f"{where} {path}.{key}", message) for key, message in _refused(model, data)]
    yield from dict.fromkeys(problems)
    if problems:
        return
    http = config.get("http_options") or {}
    if http.get("host", "127.0.0.1") in ("127.0.0.1", "localhost"):
        yield Finding(f"{where} http_options.host", "is the loopback address; no other pod reaches it. Write host: 0.0.0.0")
    if config.get("proxy_location", "EveryNode") != "EveryNode":
        yield Finding(f"{where} proxy_location", "is not EveryNode; the Service sends requests to every node with an engine")
    for number, application in enumerate(config.get("applications", [])):
        yield from _application(f"{where} applications[{number}]", application)


def _application(where: str, application: dict[str, Any]) -> Iterator[Finding]:
    from adaptfleet.contracts.errors import AdaptfleetError

    path = str(application.get("import_path", ""))
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        yield Finding(f"{where}.import_path", f"{path!r} cannot be imported: {error}")
        return
    try:
        built = builder(application.get("args") or {})
    except AdaptfleetError as error:
        yield Finding(f"{where}.args", str(error))
        return
    known = {part.name for part in _deployments(built)}
    for number, given in enumerate(application.get("deployments") or []):
        if given.get("name") not in known:
            names = ", ".join(sorted(known))
            yield Finding(f"{where}.deployments[{number}].name", f"{given.get('name')!r} is no deployment of {path}; it has {names}")
        for key in sorted({"ray_actor_options", "autoscaling_config", "num_replicas"} & set(given)):
            what = f"replaces all that the application sets for its replicas; use args ({_ARGS[key]})"
            yield Finding(f"{where}.deployments[{number}].{key}", what)


@dataclass(frozen=True)
class Replicas:
    """What each replica of a deployment takes, and how many there may be."""

    name: str
    cpus: float
    gpus: float
    least: int
    most: int
    drain_s: float


def replicas(application: dict[str, Any]) -> list[Replicas]:
    """Of an application that is known to be right."""
    module, _, attribute = str(application["import_path"]).replace(":", ".").rpartition(".")
    found = []
    for part in _deployments(getattr(importlib.import_module(module), attribute)(application.get("args") or {})):
        options, scaling = part.ray_actor_options or {}, part._deployment_config.autoscaling_config
        least, most = (scaling.min_replicas, scaling.max_replicas) if scaling else (part.num_replicas, part.num_replicas)
        drain_s = part._deployment_config.graceful_shutdown_timeout_s
        found.append(Replicas(part.name, float(options.get("num_cpus") or 0), float(options.get("num_gpus") or 0), least, most, drain_s))
    return found


def _deployments(application: Any) -> list[Any]:
    """The deployments that an application is made of."""
    bound = application._bound_deployment
    found = [bound]
    for value in (*bound.init_args, *bound.init_kwargs.values()):
        if hasattr(value, "_bound_deployment"):
            found += _deployments(value)
    return found


def _refused(model: type[BaseModel], data: Any) -> Iterator[tuple[str, str]]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        for problem in error.errors():
            if len(problem["loc"]) <= 1:  # what lies deeper is its own part's
                yield ".".join(str(part) for part in problem["loc"]), problem["msg"]


def unknown_keys(model: type[BaseModel], data: Any) -> Iterator[str]:
    """Paths of keys that no field of the pydantic models takes."""
    for path, part, value in models_of(model, data):
        for key in value if isinstance(value, dict) else ():
            if key not in _fields(part):
                yield f"{path}.{key}"


def models_of(model: type[BaseModel], data: Any, path: str = "$") -> Iterator[tuple[str, type[BaseModel], Any]]:
    """Every mapping in the data with the model that its place has, and its path."""
    yield path, model, data
    if not isinstance(data, dict):
        return
    fields = _fields(model)
    for key, value in data.items():
        for part in _models(fields[key].annotation) if key in fields else ():
            entries = value if isinstance(value, list) else [value]
            for number, entry in enumerate(entries):
                if isinstance(entry, dict):
                    yield from models_of(part, entry, f"{path}.{key}" + (f"[{number}]" if isinstance(value, list) else ""))


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field for key, field in model.model_fields.items() for name in (key, field.alias) if name}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
