"""What a manifest asks of the operator, held against operator/values.yaml: gates that must be on, namespaces that are watched."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from k8s.validation.manifests import ROOT, Document, Finding, name_of
from k8s.validation.operator_rules import ray_cluster

VALUES = ROOT / "k8s" / "operator" / "values.yaml"
_WHERE = str(VALUES.relative_to(ROOT))


@cache
def values() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    return read


def findings(document: Document) -> Iterator[Finding]:
    name = name_of(document)
    gates = {gate["name"]: gate["enabled"] for gate in values()["featureGates"]}
    for field, gate in _wanted(document):
        if not gates.get(gate):
            yield Finding(f"{name} {field}", f"needs the operator's gate {gate}, which is off in {_WHERE}")
    namespace, watched = document["metadata"].get("namespace"), values().get("watchNamespace") or []
    if watched and namespace and namespace not in watched:
        yield Finding(f"{name} metadata.namespace", f"the operator watches {', '.join(watched)} ({_WHERE}), not {namespace}")
    scheduler = values().get("batchScheduler") or {}
    if "volcano.sh/queue-name" in (document["metadata"].get("labels") or {}) and scheduler.get("name") != "volcano":
        yield Finding(f"{name} metadata.labels", f"the queue is Volcano's, which is not the batchScheduler in {_WHERE}")


def _wanted(document: Document) -> Iterator[tuple[str, str]]:
    spec = document.get("spec", {})
    if document["kind"] == "RayCronJob":
        yield "kind", "RayCronJob"
    if document["kind"] == "RayService" and (spec.get("upgradeStrategy") or {}).get("type") == "NewClusterWithIncrementalUpgrade":
        yield "spec.upgradeStrategy", "RayServiceIncrementalUpgrade"
    if (spec.get("deletionStrategy") or spec.get("jobTemplate", {}).get("deletionStrategy")) is not None:
        yield "deletionStrategy", "RayJobDeletionPolicy"
    cluster = ray_cluster(document)
    if cluster is None:
        return
    path, inner = cluster
    if (inner.get("tlsOptions") or {}).get("enabled"):
        yield f"{path}.tlsOptions", "RayClusterMTLS"
    if (inner.get("gcsFaultToleranceOptions") or {}).get("backend") == "rocksdb":
        yield f"{path}.gcsFaultToleranceOptions", "GCSFaultToleranceEmbeddedStorage"
    if inner.get("networkPolicy"):
        yield f"{path}.networkPolicy", "RayClusterNetworkPolicy"
    if inner.get("historyServerOptions"):
        yield f"{path}.historyServerOptions", "RayClusterHistoryServer"
