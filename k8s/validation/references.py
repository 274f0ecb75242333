"""Names in one manifest that another must hold: accounts, volumes, classes, queues, ports, and what selectors select."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from k8s.validation import core_kinds, extension_kinds
from k8s.validation.crds import Crds
from k8s.validation.manifests import ROOT, Document, Finding, name_of
from k8s.validation.operator_rules import ray_job
from k8s.validation.pods import Pod, pods

GUIDE = ROOT / "docs" / "kubernetes.md"
_SELECTING = ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor")
_MADE_BY_OTHERS = {"gateway.networking.k8s.io/gateway-name"}
"""Labels of pods that a controller of another project starts."""
_QUEUES = {"kueue.x-k8s.io/queue-name": "LocalQueue", "volcano.sh/queue-name": "Queue"}


def findings(documents: Sequence[Document], context: Sequence[Document], crds: Crds) -> Iterator[Finding]:
    """`context`: what is applied besides, such as the platform that a job is sent to."""
    every = [*documents, *context]
    yield from _identities(documents)
    yield from _namespaces(documents, every, crds)
    names = {(document["kind"], document["metadata"].get("name")) for document in every}
    every_pod = [pod for document in every for pod in pods(document)]
    guide = GUIDE.read_text(encoding="utf-8") if GUIDE.is_file() else ""
    for document in documents:
        for pod in pods(document):
            yield from _of_a_pod(pod, names, guide)
        yield from _queues(document, names)
        job = ray_job(document)
        cluster = ((job[1].get("clusterSelector") if job else None) or {}).get("ray.io/cluster")
        if job and cluster and ("RayCluster", cluster) not in names:
            yield Finding(f"{name_of(document)} {job[0]}.clusterSelector", f"there is no RayCluster {cluster!r}")
        if document["kind"] in _SELECTING:
            yield from _selector(document, every_pod, every)
        if document["kind"] == "Service":
            yield from _service(document, every_pod)
        if document["kind"] == "RoleBinding" and ("Role", document["roleRef"].get("name")) not in names:
            yield Finding(f"{name_of(document)} roleRef", f"there is no Role {document['roleRef'].get('name')!r}")


def _identities(documents: Sequence[Document]) -> Iterator[Finding]:
    seen: set[tuple[str, ...]] = set()
    for document in documents:
        metadata = document["metadata"]
        key = (document["apiVersion"], document["kind"], str(metadata.get("namespace")), str(metadata.get("name")))
        if key in seen:
            yield Finding(name_of(document), "stands twice")
        seen.add(key)


def _namespaces(documents: Sequence[Document], every: Sequence[Document], crds: Crds) -> Iterator[Finding]:
    made = {document["metadata"].get("name") for document in every if document["kind"] == "Namespace"}
    for document in documents:
        given = document["metadata"].get("namespace")
        if not _is_namespaced(document, crds):
            if given:
                yield Finding(f"{name_of(document)} metadata.namespace", f"is {given!r}, but the kind belongs to the whole cluster")
        elif given not in made:
            yield Finding(f"{name_of(document)} metadata.namespace", f"is {given!r}; the namespaces made here are {sorted(map(str, made))}")


def _is_namespaced(document: Document, crds: Crds) -> bool:
    if crds.knows(document):
        return crds.is_namespaced(document)
    if extension_kinds.knows(document):
        return extension_kinds.is_namespaced(document)
    return document["kind"] not in core_kinds.CLUSTER_SCOPED


def _of_a_pod(pod: Pod, names: set[tuple[str, Any]], guide: str) -> Iterator[Finding]:
    wanted: list[tuple[str, Any, str]] = [
        ("ServiceAccount", pod.spec.get("serviceAccountName"), "serviceAccountName"),
        ("PriorityClass", pod.spec.get("priorityClassName"), "priorityClassName"),
    ]
    for volume in pod.spec.get("volumes") or []:
        wanted.append(
            ("PersistentVolumeClaim", (volume.get("persistentVolumeClaim") or {}).get("claimName"), f"volumes {volume.get('name')}")
        )
        wanted.append(("ConfigMap", (volume.get("configMap") or {}).get("name"), f"volumes {volume.get('name')}"))
        wanted.append(("Secret", (volume.get("secret") or {}).get("secretName"), f"volumes {volume.get('name')}"))
    for container in pod.spec.get("containers") or []:
        for source in container.get("envFrom") or []:
            wanted.append(("ConfigMap", (source.get("configMapRef") or {}).get("name"), "envFrom"))
            wanted.append(("Secret", (source.get("secretRef") or {}).get("name"), "envFrom"))
        for variable in container.get("env") or []:
            origin = variable.get("valueFrom") or {}
            wanted.append(("ConfigMap", (origin.get("configMapKeyRef") or {}).get("name"), f"env {variable['name']}"))
            wanted.append(("Secret", (origin.get("secretKeyRef") or {}).get("name"), f"env {variable['name']}"))
    for kind, name, where in wanted:
        yield from _is_there(f"{pod.where}.spec.{where}", kind, name, names, guide)


def _is_there(where: str, kind: str, name: Any, names: set[tuple[str, Any]], guide: str) -> Iterator[Finding]:
    if not name or (kind, name) in names:
        return
    if kind == "Secret":
        if f"secret generic {name}" not in guide:
            yield Finding(where, f"the Secret {name!r} is made by nobody; {GUIDE.relative_to(ROOT)} must say how")
        return
    yield Finding(where, f"there is no {kind} {name!r}")


def secrets_of(document: Document) -> Iterator[tuple[str, str]]:
    """Secrets that fields outside of pods name: tokens, passwords, keys of monitors."""
    stack: list[tuple[str, Any]] = [("", document)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            for key, part in value.items():
                if key == "secretName" and isinstance(part, str):
                    yield f"{path}.{key}".lstrip("."), part
                if key in ("secretKeyRef", "credentials") and isinstance(part, dict) and part.get("name"):
                    yield f"{path}.{key}".lstrip("."), part["name"]
                stack.append((f"{path}.{key}", part))
        elif isinstance(value, list):
            stack += [(f"{path}[{number}]", part) for number, part in enumerate(value)]


def secret_findings(document: Document) -> Iterator[Finding]:
    guide = GUIDE.read_text(encoding="utf-8") if GUIDE.is_file() else ""
    if document["kind"] == "Secret":
        yield Finding(name_of(document), "is a Secret; keys do not belong in manifests")
    for path, name in secrets_of(document):
        yield from _is_there(f"{name_of(document)} {path}", "Secret", name, set(), guide)


def _queues(document: Document, names: set[tuple[str, Any]]) -> Iterator[Finding]:
    labels = document["metadata"].get("labels") or {}
    for label, kind in _QUEUES.items():
        if label in labels and (kind, labels[label]) not in names:
            yield Finding(f"{name_of(document)} metadata.labels {label}", f"there is no {kind} {labels[label]!r}")
    priority = labels.get("kueue.x-k8s.io/priority-class")
    if priority and ("WorkloadPriorityClass", priority) not in names:
        yield Finding(f"{name_of(document)} metadata.labels", f"there is no WorkloadPriorityClass {priority!r}")
    if document["kind"] == "RayJob" and "kueue.x-k8s.io/queue-name" in labels and document["spec"].get("suspend") is not True:
        yield Finding(f"{name_of(document)} spec.suspend", "is to be true for a job in a queue, or it starts before it is admitted")
    if document["kind"] == "LocalQueue" and ("ClusterQueue", document["spec"].get("clusterQueue")) not in names:
        yield Finding(f"{name_of(document)} spec.clusterQueue", f"there is no ClusterQueue {document['spec'].get('clusterQueue')!r}")
    if document["kind"] == "ClusterQueue":
        for group in document["spec"].get("resourceGroups") or []:
            for flavor in group.get("flavors") or []:
                if ("ResourceFlavor", flavor.get("name")) not in names:
                    yield Finding(f"{name_of(document)} spec.resourceGroups", f"there is no ResourceFlavor {flavor.get('name')!r}")


def selects(selector: Document, labels: dict[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions") or []:
        has, value = rule["key"] in labels, labels.get(rule["key"])
        holds = {
            "In": has and value in (rule.get("values") or []),
            "NotIn": value not in (rule.get("values") or []),
            "Exists": has,
            "DoesNotExist": not has,
        }
        if not holds.get(rule["operator"], False):
            return False
    return True


def _selector(document: Document, every_pod: Iterable[Pod], every: Sequence[Document]) -> Iterator[Finding]:
    spec = document["spec"]
    selector = spec.get("podSelector" if document["kind"] == "NetworkPolicy" else "selector") or {}
    selected = [pod for pod in every_pod if selects(selector, pod.labels)]
    keys = {*(selector.get("matchLabels") or {}), *(rule["key"] for rule in selector.get("matchExpressions") or [])}
    if not selected and not keys & _MADE_BY_OTHERS:
        yield Finding(f"{name_of(document)} selector", f"{selector} selects no pod of these manifests")
    is_of_ray = any(pod.role in ("head", "worker") for pod in selected)
    # Kubernetes knows no number of replicas of a custom resource without a scale.
    if document["kind"] == "PodDisruptionBudget" and is_of_ray and not isinstance(spec.get("minAvailable"), int):
        yield Finding(f"{name_of(document)} spec", "over Ray's pods only a whole number as minAvailable works")
    if document["kind"] == "PodMonitor":
        for number, endpoint in enumerate(spec.get("podMetricsEndpoints") or []):
            where = f"{name_of(document)} spec.podMetricsEndpoints[{number}].port"
            for pod in selected:
                port = _port(pod, endpoint.get("port"))
                if port is None:
                    yield Finding(where, f"{pod.where} has no port named {endpoint.get('port')!r}")
                elif not _may_enter(pod, port, every):
                    yield Finding(where, f"no NetworkPolicy lets another namespace reach {port} of {pod.where}")


def _port(pod: Pod, name: Any) -> int | None:
    for container in pod.spec.get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == name:
                return int(port["containerPort"])
    return None


def _may_enter(pod: Pod, port: int, every: Sequence[Document]) -> bool:
    policies = [document for document in every if document["kind"] == "NetworkPolicy"]
    for policy in policies:
        if not selects(policy["spec"].get("podSelector") or {}, pod.labels):
            continue
        for rule in policy["spec"].get("ingress") or []:
            outside = any("namespaceSelector" in origin for origin in rule.get("from") or [])
            if outside and any(given.get("port") == port for given in rule.get("ports") or []):
                return True
    return not policies


def _service(document: Document, every_pod: Iterable[Pod]) -> Iterator[Finding]:
    selector = document["spec"].get("selector") or {}
    selected = [pod for pod in every_pod if selects({"matchLabels": selector}, pod.labels)]
    if not selected:
        yield Finding(f"{name_of(document)} spec.selector", f"{selector} selects no pod of these manifests")
    for port in document["spec"].get("ports") or []:
        target = port.get("targetPort", port.get("port"))
        if isinstance(target, str) and any(_port(pod, target) is None for pod in selected):
            yield Finding(f"{name_of(document)} spec.ports", f"no container port is named {target!r}")


def documented_secrets() -> set[str]:
    return set(re.findall(r"secret generic ([\w-]+)", GUIDE.read_text(encoding="utf-8")))
