"""What every pod of ours keeps to, whichever kind makes it: confined, sized, placed, and with time to end in order."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from k8s.validation.manifests import Document, Finding, name_of
from k8s.validation.operator_rules import ray_cluster, ray_job

Role = Literal["head", "worker", "submitter", "other"]
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_MIN_HEAD_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Pod:
    """A pod's template, and where it stands."""

    owner: Document
    path: str
    role: Role
    template: Document
    group: Document

    @property
    def where(self) -> str:
        return f"{name_of(self.owner)} {self.path}"

    @property
    def spec(self) -> Document:
        spec: Document = self.template.get("spec", {})
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """Its own, and those that KubeRay adds."""
        given = dict(self.template.get("metadata", {}).get("labels") or {})
        if self.role in ("head", "worker"):
            given |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": self.role}
            if self.owner["kind"] == "RayCluster":
                given["ray.io/cluster"] = self.owner["metadata"]["name"]
            given["ray.io/group"] = "headgroup" if self.role == "head" else str(self.group.get("groupName"))
        return given


def pods(document: Document) -> Iterator[Pod]:
    cluster = ray_cluster(document)
    if cluster:
        path, spec = cluster
        head = spec.get("headGroupSpec", {})
        yield Pod(document, f"{path}.headGroupSpec.template", "head", head.get("template", {}), head)
        for number, group in enumerate(spec.get("workerGroupSpecs") or []):
            yield Pod(document, f"{path}.workerGroupSpecs[{number}].template", "worker", group.get("template", {}), group)
    job = ray_job(document)
    if job and job[1].get("submitterPodTemplate"):
        yield Pod(document, f"{job[0]}.submitterPodTemplate", "submitter", job[1]["submitterPodTemplate"], {})
    if document["kind"] in ("StatefulSet", "Deployment", "DaemonSet", "Job"):
        yield Pod(document, "spec.template", "other", document["spec"].get("template", {}), {})


def quantity(value: Any) -> float:
    """Bytes, cores or pieces."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(value))
    if matched is None or matched[2] not in _UNITS:
        raise ValueError(f"{value!r} is no quantity of Kubernetes")
    return float(matched[1]) * _UNITS[matched[2]]


def findings(document: Document) -> Iterator[Finding]:
    for pod in pods(document):
        yield from _confinement(pod)
        yield from _placement(pod)
        for number, container in enumerate(pod.spec.get("containers", [])):
            yield from _container(pod, f"{pod.where}.spec.containers[{number}]", container)
        yield from _mounts(pod)
        yield from _end(pod)
    job = ray_job(document)
    if job and job[1].get("submissionMode", "K8sJobMode") == "K8sJobMode" and not job[1].get("submitterPodTemplate"):
        yield Finding(f"{name_of(document)} {job[0]}", "has no submitterPodTemplate; KubeRay's own is refused by Pod Security `restricted`")
    cluster = ray_cluster(document)
    if cluster:
        yield from _cluster(f"{name_of(document)} {cluster[0]}", cluster[1])


def _confinement(pod: Pod) -> Iterator[Finding]:
    security = pod.spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield Finding(f"{pod.where}.spec.securityContext", "needs runAsNonRoot: true and a runAsUser that is not 0")
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield Finding(f"{pod.where}.spec.securityContext.seccompProfile", "is to be RuntimeDefault")
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(field):
            yield Finding(f"{pod.where}.spec.{field}", "opens the host to the pod")
    for volume in pod.spec.get("volumes") or []:
        if "hostPath" in volume:
            yield Finding(f"{pod.where}.spec.volumes {volume.get('name')}", "is a hostPath, which Pod Security `restricted` refuses")
    if pod.role != "head" and pod.spec.get("automountServiceAccountToken") is not False:
        yield Finding(f"{pod.where}.spec", "needs automountServiceAccountToken: false; only a head talks to Kubernetes")
    if not pod.spec.get("serviceAccountName"):
        yield Finding(f"{pod.where}.spec.serviceAccountName", "is missing; the namespace's default account is nobody's")


def _container(pod: Pod, where: str, container: Document) -> Iterator[Finding]:
    security = container.get("securityContext") or {}
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield Finding(f"{where}.securityContext", "needs allowPrivilegeEscalation: false")
    if (security.get("capabilities") or {}).get("drop") != ["ALL"] or (security.get("capabilities") or {}).get("add"):
        yield Finding(f"{where}.securityContext.capabilities", "needs drop: [ALL] and nothing added")
    if security.get("readOnlyRootFilesystem") is not True:
        yield Finding(f"{where}.securityContext.readOnlyRootFilesystem", "is to be true; what is written goes to volumes")
    image = str(container.get("image", ""))
    if ":" not in image.rpartition("/")[2] or image.endswith(":latest"):
        yield Finding(f"{where}.image", f"{image!r} names no version")
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name, value in {**requests, **limits}.items():
        try:
            quantity(value)
        except ValueError as error:
            yield Finding(f"{where}.resources.{name}", str(error))
            return
    if not requests.get("memory") or requests.get("memory") != limits.get("memory"):
        yield Finding(f"{where}.resources", "memory is to be requested and limited to the same: a pod beyond its request is killed first")
    if not requests.get("cpu"):
        yield Finding(f"{where}.resources.requests.cpu", "is missing")
    for name in {*requests, *limits} - {"cpu", "memory", "ephemeral-storage"}:
        if requests.get(name) != limits.get(name):
            yield Finding(f"{where}.resources", f"{name}: request {requests.get(name)} and limit {limits.get(name)} differ")
    for variable in container.get("env") or []:
        if "value" in variable and re.search(r"(?i)(password|secret|token|api_?key)", variable["name"]):
            yield Finding(f"{where}.env {variable['name']}", "is a secret in plain sight; take it from a Secret")


def _placement(pod: Pod) -> Iterator[Finding]:
    if pod.role in ("head", "worker") and not pod.spec.get("priorityClassName"):
        yield Finding(f"{pod.where}.spec.priorityClassName", "is missing; without it nothing says who gives way")
    if pod.role == "worker" and pod.group.get("numOfHosts", 1) == 1 and not pod.spec.get("topologySpreadConstraints"):
        yield Finding(f"{pod.where}.spec.topologySpreadConstraints", "are missing; one zone could hold all")
    selector = pod.spec.get("nodeSelector") or {}
    if pod.role == "head":
        terms = str((pod.spec.get("affinity") or {}).get("nodeAffinity"))
        if "NotIn" not in terms or "spot" not in terms or "spot" in selector.values():
            yield Finding(f"{pod.where}.spec.affinity", "a head must keep off spot nodes; its loss is everybody's")
        annotations = pod.template.get("metadata", {}).get("annotations") or {}
        if annotations.get("cluster-autoscaler.kubernetes.io/safe-to-evict") != "false":
            yield Finding(f"{pod.where}.metadata.annotations", "a head must not be moved to save a node (safe-to-evict: false)")
    market = (pod.group.get("labels") or {}).get("ray.io/market-type")
    if selector.get("adaptfleet.io/market") and market and selector["adaptfleet.io/market"] != market:
        yield Finding(f"{pod.where}.spec.nodeSelector", f"asks for {selector['adaptfleet.io/market']} nodes, the label says {market}")
    keys = {toleration.get("key") for toleration in pod.spec.get("tolerations") or []}
    if _requests(pod, "nvidia.com/gpu") and "nvidia.com/gpu" not in keys:
        yield Finding(f"{pod.where}.spec.tolerations", "accelerator nodes are tainted with nvidia.com/gpu, which is not tolerated")
    if market == "spot" and selector and "adaptfleet.io/spot" not in keys:
        yield Finding(f"{pod.where}.spec.tolerations", "spot nodes are tainted with adaptfleet.io/spot, which is not tolerated")


def _requests(pod: Pod, name: str) -> Any:
    container = (pod.spec.get("containers") or [{}])[0]
    return ((container.get("resources") or {}).get("limits") or {}).get(name)


def _mounts(pod: Pod) -> Iterator[Finding]:
    if pod.role == "other":
        return
    volumes = {volume.get("name"): volume for volume in pod.spec.get("volumes") or []}
    mounts = {mount.get("mountPath"): mount.get("name") for mount in (pod.spec.get("containers") or [{}])[0].get("volumeMounts") or []}
    for path, name in mounts.items():
        if name not in volumes:
            yield Finding(f"{pod.where}.spec", f"mounts {name!r} at {path}, and has no such volume")
    if "/tmp" not in mounts:
        yield Finding(f"{pod.where}.spec", "needs a volume at /tmp: its root is read-only, and Ray's sessions are there")
    if pod.role in ("head", "worker"):
        memory = (volumes.get(mounts.get("/dev/shm")) or {}).get("emptyDir") or {}
        if memory.get("medium") != "Memory" or not memory.get("sizeLimit"):
            yield Finding(f"{pod.where}.spec", "needs an emptyDir of medium Memory with a sizeLimit at /dev/shm, for Ray's object store")
        elif _requests(pod, "memory") and quantity(memory["sizeLimit"]) > quantity(_requests(pod, "memory")) / 2:
            yield Finding(f"{pod.where}.spec", f"/dev/shm of {memory['sizeLimit']} is more than half of the memory, which it counts to")


def _end(pod: Pod) -> Iterator[Finding]:
    if pod.role not in ("head", "worker"):
        return
    grace = pod.spec.get("terminationGracePeriodSeconds")
    if grace is None:
        yield Finding(f"{pod.where}.spec.terminationGracePeriodSeconds", "is missing; 30 s are too few to leave in order")
        return
    container = (pod.spec.get("containers") or [{}])[0]
    drain = {variable["name"]: variable.get("value") for variable in container.get("env") or []}.get(DRAIN)
    if pod.role == "worker" and (drain is None or not 0 < float(drain) < grace):
        yield Finding(f"{pod.where}.spec", f"{DRAIN} is {drain}; it must be set and end within the grace period of {grace} s")


def _cluster(where: str, spec: Document) -> Iterator[Finding]:
    head = spec.get("headGroupSpec", {})
    resources = head.get("resources") or {}
    if str(resources.get("CPU", head.get("rayStartParams", {}).get("num-cpus"))) != "0":
        yield Finding(f"{where}.headGroupSpec.resources", 'needs CPU: "0": work on the head takes memory from what all others need')
    if not spec.get("enableInTreeAutoscaling") or (spec.get("autoscalerOptions") or {}).get("version") != "v2":
        yield Finding(where, "needs enableInTreeAutoscaling and autoscalerOptions.version v2; an idle accelerator is paid for")
    options = spec.get("autoscalerOptions") or {}
    if (options.get("securityContext") or {}).get("runAsNonRoot") is not True:
        yield Finding(
            f"{where}.autoscalerOptions.securityContext", "is missing; Pod Security `restricted` refuses the head's pod without it"
        )
    for group in spec.get("workerGroupSpecs") or []:
        if (group.get("idleTimeoutSeconds") or options.get("idleTimeoutSeconds") or 60) < 60:
            yield Finding(f"{where} {group.get('groupName')}.idleTimeoutSeconds", "is below 60; nodes would come and go between two tasks")
        if group.get("minReplicas") is None or group.get("maxReplicas") is None:
            what = "minReplicas and maxReplicas are both to be written; Ray's autoscaler reads them without defaults"
            yield Finding(f"{where} {group.get('groupName')}", what)
        if "replicas" in group:
            yield Finding(
                f"{where} {group.get('groupName')}.replicas", "is the autoscaler's; applied again, it would resize a running pool"
            )
        if not (group.get("labels") or {}).get("ray.io/market-type"):
            yield Finding(f"{where} {group.get('groupName')}.labels", "needs ray.io/market-type: on-demand or spot")


def min_head_findings(document: Document) -> Iterator[Finding]:
    """For clusters that others rely on: a head of less than 8 GiB is the first to run out."""
    for pod in pods(document):
        if pod.role == "head" and quantity(_requests(pod, "memory") or 0) < _MIN_HEAD_BYTES:
            yield Finding(pod.where, f"the head has {_requests(pod, 'memory')}; it should have 8Gi or more")
