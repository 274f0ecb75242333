"""The objects of the API: versioned, listed by labels, deleted with what they own."""

import copy
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

Object = dict[str, Any]


class Kind(NamedTuple):
    api: str
    """Group and version: `v1`, `ray.io/v1`."""
    kind: str
    plural: str


POD = Kind("v1", "Pod", "pods")
RAY_CLUSTER = Kind("ray.io/v1", "RayCluster", "rayclusters")
RAY_JOB = Kind("ray.io/v1", "RayJob", "rayjobs")
RAY_SERVICE = Kind("ray.io/v1", "RayService", "rayservices")
ACTED_ON = (POD, RAY_CLUSTER, RAY_JOB, RAY_SERVICE, Kind("v1", "Secret", "secrets"), Kind("v1", "ConfigMap", "configmaps"))
"""Kinds that something here reads; others are kept and shown."""


class NotFoundError(Exception):
    """No such object."""


class ConflictError(Exception):
    """It exists, or is not what the writer took it for."""


def now() -> str:
    """As Kubernetes writes times, with microseconds, for deadlines of seconds."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def seconds_since(time: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def name_of(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def has_condition(thing: Object | None, kind: str) -> bool:
    conditions = ((thing or {}).get("status") or {}).get("conditions") or ()
    return any(entry["type"] == kind and entry["status"] == "True" for entry in conditions)


def conditions(*true: str) -> list[Object]:
    return [{"type": kind, "status": "True"} for kind in sorted(true)]


def owned_by(thing: Object) -> Object:
    """The metadata of a new object that goes when `thing` goes."""
    meta = thing["metadata"]
    owner = {"apiVersion": thing["apiVersion"], "kind": thing["kind"], "name": meta["name"], "uid": meta["uid"], "controller": True}
    return {"namespace": meta["namespace"], "ownerReferences": [owner]}


class Objects:
    """All methods may be called from any thread; what they return is a copy."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._items: dict[tuple[str, str, str], Object] = {}
        self._version = 0

    @property
    def version(self) -> str:
        return str(self._version)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        with self._lock:
            return copy.deepcopy(self._find(plural, namespace, name))

    def find(self, plural: str, namespace: str, name: str) -> Object | None:
        try:
            return self.get(plural, namespace, name)
        except NotFoundError:
            return None

    def listed(self, plural: str, namespace: str | None = None, labels: Mapping[str, str] | None = None) -> list[Object]:
        """In the order of their making."""
        with self._lock:
            return [
                copy.deepcopy(item)
                for (kind, space, _), item in self._items.items()
                if kind == plural and namespace in (None, space) and _has_labels(item, labels or {})
            ]

    def create(self, plural: str, thing: Object) -> Object:
        with self._lock:
            made = copy.deepcopy(thing)
            meta = made["metadata"]
            key = plural, meta.setdefault("namespace", "default"), meta["name"]
            if key in self._items:
                raise ConflictError(f"{plural} {meta['name']!r} exists")
            meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1, "resourceVersion": self._next()}
            meta.pop("deletionTimestamp", None)
            self._items[key] = made
            return copy.deepcopy(made)

    def change(self, plural: str, namespace: str, name: str, edit: Callable[[Object], Object | None]) -> Object:
        """`edit` gets a copy, and changes it or returns another. A changed spec raises the generation."""
        with self._lock:
            old = self._find(plural, namespace, name)
            working = copy.deepcopy(old)
            new = edit(working) or working
            if new == old:
                return copy.deepcopy(old)
            kept = ("uid", "creationTimestamp", "name", "namespace")
            new["metadata"] |= {key: old["metadata"][key] for key in kept}
            new["metadata"]["generation"] = old["metadata"]["generation"] + (new.get("spec") != old.get("spec"))
            new["metadata"]["resourceVersion"] = self._next()
            self._items[plural, namespace, name] = new
            self._drop_finished(plural, namespace, name)
            return copy.deepcopy(new)

    def set_status(self, plural: str, namespace: str, name: str, status: Object) -> None:
        """Nothing happens where it has gone meanwhile."""
        with self._lock:
            if (plural, namespace, name) in self._items:
                self.change(plural, namespace, name, lambda thing: {**thing, "status": status})

    def delete(self, plural: str, namespace: str, name: str, grace_s: float | None = None) -> Object:
        """Marked, and gone once nothing holds it: processes hold a pod, finalizers the rest. What it owns goes after it."""
        with self._lock:
            item = self._find(plural, namespace, name)
            meta = item["metadata"]
            meta.setdefault("deletionTimestamp", now())
            if plural == POD.plural:
                default = item.get("spec", {}).get("terminationGracePeriodSeconds", 30)
                meta["deletionGracePeriodSeconds"] = min(
                    default if grace_s is None else grace_s, meta.get("deletionGracePeriodSeconds", 3600)
                )
            meta["resourceVersion"] = self._next()
            self._drop_finished(plural, namespace, name)
            return copy.deepcopy(item)

    def forget(self, plural: str, namespace: str, name: str) -> None:
        """Takes out an object that nothing holds any more."""
        with self._lock:
            item = self._items.pop((plural, namespace, name), None)
            if item is None:
                return
            self._next()
            uid = item["metadata"]["uid"]
            for (kind, space, child), other in list(self._items.items()):
                if any(owner["uid"] == uid for owner in other["metadata"].get("ownerReferences", ())):
                    self.delete(kind, space, child)

    def _find(self, plural: str, namespace: str, name: str) -> Object:
        try:
            return self._items[plural, namespace, name]
        except KeyError:
            raise NotFoundError(f"{plural} {name!r} not found in namespace {namespace!r}") from None

    def _drop_finished(self, plural: str, namespace: str, name: str) -> None:
        meta = self._items[plural, namespace, name]["metadata"]
        if "deletionTimestamp" in meta and plural != POD.plural and not meta.get("finalizers"):
            self.forget(plural, namespace, name)

    def _next(self) -> str:
        self._version += 1
        return str(self._version)


def _has_labels(item: Object, labels: Mapping[str, str]) -> bool:
    own = item["metadata"].get("labels", {})
    return all(own.get(key) == value for key, value in labels.items())


def merge(into: Object, patch: Object) -> Object:
    """RFC 7396: a null removes, a mapping goes deeper, all else replaces."""
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
    return into


def patched(thing: Object, operations: Iterable[Object]) -> Object:
    """RFC 6902's add, replace, remove and test. ConflictError where a test fails or a path leads nowhere."""
    for operation in operations:
        *parents, last = [key.replace("~1", "/").replace("~0", "~") for key in operation["path"].split("/")[1:]]
        at: Any = thing
        try:
            for key in parents:
                at = at[int(key)] if isinstance(at, list) else at[key]
            _apply(operation, at, last)
        except (KeyError, IndexError, ValueError, TypeError):
            raise ConflictError(f"the patch's path {operation['path']!r} does not exist") from None
    return thing


def _key(at: Any, last: str) -> Any:
    return last if isinstance(at, dict) or last == "-" else int(last)


def _apply(operation: Object, at: Any, last: str) -> None:
    what, key = operation["op"], _key(at, last)
    if what == "test":
        if at[key] != operation["value"]:
            raise ConflictError(f"{operation['path']} is {at[key]!r}, not {operation['value']!r}")
    elif what == "remove":
        del at[key]
    elif what in ("add", "replace") and isinstance(at, list):
        if key == "-":
            at.append(operation["value"])
        elif what == "add":
            at.insert(key, operation["value"])
        else:
            at[key] = operation["value"]
    elif what in ("add", "replace"):
        # Lenient as the operator's CRD makes it: `scaleStrategy` is replaced where the manifest has none.
        at[key] = operation["value"]
    else:
        raise ConflictError(f"the patch's operation {what!r} is not one of add, replace, remove, test")
