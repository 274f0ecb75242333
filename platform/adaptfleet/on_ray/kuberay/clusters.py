"""RayClusters: their pods, as the operator's `reconcilePods` (v1.7.0) makes and deletes them."""

import hashlib
import json
import secrets
import urllib.error
import urllib.request
from typing import Any

from adaptfleet.on_ray.kuberay.fleet import Amounts, Claim, schedule
from adaptfleet.on_ray.kuberay.objects import (
    POD,
    RAY_CLUSTER,
    Object,
    Objects,
    conditions,
    has_condition,
    name_of,
    now,
    owned_by,
    seconds_since,
)
from adaptfleet.on_ray.kuberay.place import Place, free_ports
from adaptfleet.on_ray.kuberay.pod_commands import (
    HEAD_GROUP,
    ClusterPorts,
    MissingReferenceError,
    autoscaler_argv,
    autoscaler_env,
    container_env,
    head_argv,
    ray_env,
    with_redis_login,
    worker_argv,
)
from adaptfleet.on_ray.kuberay.pods import Pods

SERVE_PORT = "adaptfleet.dev/serve-port"
_TERMINAL = ("Failed", "Succeeded")


def spec_hash(spec: Object) -> str:
    """Of what a change of replaces pods or clusters: not of how many there are."""
    groups = [
        {key: value for key, value in group.items() if key not in ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")}
        for group in spec.get("workerGroupSpecs") or ()
    ]
    kept = {key: value for key, value in spec.items() if key != "suspend"} | {"workerGroupSpecs": groups}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def desired_pods(group: Object) -> int:
    if group.get("suspend"):
        return 0
    return int(max(min(group["replicas"], group["maxReplicas"]), group["minReplicas"]) * group["numOfHosts"])


def surplus(group: Object, pods: list[Object], autoscaled: bool) -> list[str]:
    """Pods of the group that go: failed ones, those named by the autoscaler, all of a suspended group. Without an autoscaler also as many
    as there are too many; with one only it decides which."""
    if group.get("suspend"):
        return [name_of(pod) for pod in pods]
    failed = [name_of(pod) for pod in pods if (pod.get("status") or {}).get("phase") in _TERMINAL]
    if failed:
        return failed
    named = set(group.get("scaleStrategy", {}).get("workersToDelete") or ())
    going = [name_of(pod) for pod in pods if name_of(pod) in named]
    staying = [name_of(pod) for pod in pods if name_of(pod) not in named]
    return going if autoscaled else going + staying[desired_pods(group) :]


class Clusters:
    def __init__(self, objects: Objects, pods: Pods, place: Place, fleet: Amounts | None = None) -> None:
        """`fleet`: what all pods together may have, such as {"nvidia.com/gpu": 4}; None: whatever they ask for."""
        self._objects = objects
        self._pods = pods
        self._place = place
        self._fleet = fleet
        self._ray_folders: dict[str, str] = {}

    def sync(self) -> None:
        for cluster in self._objects.listed(RAY_CLUSTER.plural):
            if "deletionTimestamp" not in cluster["metadata"]:
                self._reconcile(cluster)
        pods = self._objects.listed(POD.plural)
        waiting = self._shared_out(pods) if self._fleet is not None else set()
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                continue
            if pod["metadata"]["uid"] in waiting:
                self._pods.set_waiting(pod, "Unschedulable", "the fleet has no room for it now")
            else:
                self._run(pod)

    def _shared_out(self, pods: list[Object]) -> set[str]:
        """Gives notice to pods that must make room, and returns those that wait for it."""
        assert self._fleet is not None
        by_uid = {pod["metadata"]["uid"]: pod for pod in pods}
        claims = [self._claim(pod) for pod in pods if (pod.get("status") or {}).get("phase") not in _TERMINAL]
        plan = schedule(self._fleet, claims)
        for uid in plan.preempt:
            self._delete(by_uid[uid])
        return set(plan.waiting) | set(plan.preempt)

    def _claim(self, pod: Object) -> Claim:
        meta, spec = pod["metadata"], pod["spec"]
        named = self._objects.find("priorityclasses", "default", spec.get("priorityClassName", "")) or {}
        return Claim(
            name=meta["uid"],
            priority=int(spec.get("priority", named.get("value", 0))),
            amounts=asked_for(pod),
            since=-seconds_since(meta["creationTimestamp"]),
            is_running=self._pods.is_started(pod) and "deletionTimestamp" not in meta,
            is_ending="deletionTimestamp" in meta,
        )

    def _reconcile(self, cluster: Object) -> None:
        meta, spec = cluster["metadata"], cluster["spec"]
        if not (cluster.get("status") or {}).get("endpoints"):
            cluster = self._give_ports(cluster)
        pods = self._objects.listed(POD.plural, meta["namespace"], {"ray.io/cluster": meta["name"]})
        alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        if spec.get("suspend"):
            for pod in alive:
                self._delete(pod)
            self._set_status(cluster, pods)
            return
        if (spec.get("upgradeStrategy") or {}).get("type") == "Recreate" and self._is_outdated(cluster, alive):
            for pod in alive:
                self._delete(pod)
            return
        self._reconcile_head(cluster, [pod for pod in pods if _group(pod) == HEAD_GROUP])
        for group in spec.get("workerGroupSpecs") or ():
            mine = [pod for pod in alive if _group(pod) == group["groupName"]]
            going = surplus(group, mine, bool(spec.get("enableInTreeAutoscaling")))
            for name in going:
                self._objects.delete(POD.plural, meta["namespace"], name)
            for _ in range(desired_pods(group) - (len(mine) - len(going))):
                self._create(cluster, group, group["groupName"])
        self._set_status(cluster, pods)

    def _reconcile_head(self, cluster: Object, heads: list[Object]) -> None:
        if not heads:
            is_provisioned = has_condition(cluster, "RayClusterProvisioned")
            stays_down = cluster["metadata"].get("annotations", {}).get("ray.io/disable-provisioned-head-restart") == "true"
            if not (is_provisioned and stays_down):
                self._create(cluster, cluster["spec"]["headGroupSpec"], HEAD_GROUP)
        for head in heads:
            if "deletionTimestamp" not in head["metadata"] and (head.get("status") or {}).get("phase") in _TERMINAL:
                self._delete(head)

    def _create(self, cluster: Object, group: Object, group_name: str) -> None:
        meta, is_head = cluster["metadata"], group_name == HEAD_GROUP
        suffix = "head" if is_head else f"{group_name}-worker"
        template = group["template"]
        labels = template.get("metadata", {}).get("labels", {}) | {
            "ray.io/cluster": meta["name"],
            "ray.io/node-type": "head" if is_head else "worker",
            "ray.io/group": group_name,
            "ray.io/is-ray-node": "yes",
        }
        annotations = template.get("metadata", {}).get("annotations", {}) | {"ray.io/spec-hash": spec_hash(cluster["spec"])}
        ports = ClusterPorts.of(cluster)
        annotations[SERVE_PORT] = str(ports.serve if is_head else free_ports(1)[0])
        pod_meta = {"name": f"{meta['name']}-{suffix}-{secrets.token_hex(3)[:5]}", "labels": labels, "annotations": annotations}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": owned_by(cluster) | pod_meta, "spec": template["spec"]}
        self._objects.create(POD.plural, pod | {"status": {"phase": "Pending", "containerStatuses": []}})

    def _run(self, pod: Object) -> None:
        """Starts what waits, and sees whether a head has become ready."""
        meta = pod["metadata"]
        cluster = self._objects.find(RAY_CLUSTER.plural, meta["namespace"], meta.get("labels", {}).get("ray.io/cluster", ""))
        if cluster is None or (pod.get("status") or {}).get("phase") in _TERMINAL:
            return
        is_head = _group(pod) == HEAD_GROUP
        if not self._pods.is_started(pod):
            # An init container of the operator's holds a worker back until the head answers.
            if is_head or is_ready(self._head(cluster)):
                self._start(cluster, pod)
        elif is_head:
            self._watch_head(cluster, pod)

    def _start(self, cluster: Object, pod: Object) -> None:
        meta, group_name = pod["metadata"], _group(pod)
        try:
            made = with_redis_login(pod, cluster) if group_name == HEAD_GROUP else pod
            env = container_env(made, lambda plural, name: self._objects.find(plural, meta["namespace"], name))
        except MissingReferenceError as error:
            self._pods.set_waiting(pod, "CreateContainerConfigError", str(error))
            return
        ports, spec = ClusterPorts.of(cluster), cluster["spec"]
        group = (
            spec["headGroupSpec"] if group_name == HEAD_GROUP else next(g for g in spec["workerGroupSpecs"] if g["groupName"] == group_name)
        )
        env |= ray_env(cluster, group_name, meta["name"], int(meta["annotations"][SERVE_PORT]), self._place.folder)
        if "RAY_gcs_storage_path" in env:
            (self._place.folder / "gcs" / cluster["metadata"]["uid"]).mkdir(parents=True, exist_ok=True)
        node = _as_autoscaler_reads(cluster)[group_name]
        if group_name == HEAD_GROUP:
            ray_folder = self._place.folder / self._ray_folder(cluster)
            # Workers that outlived the head name its address, which Ray takes for a head that runs, were it not for this file (2.60).
            (ray_folder / "ray_current_cluster").unlink(missing_ok=True)
            argv = head_argv(group, node, ports, ray_folder, env)
        else:
            # Of its own: two nodes that start at once would take the same names for their sockets.
            argv = worker_argv(group, node, ports, self._place.folder / "w" / meta["name"][-5:])
        self._pods.start(pod, argv, env)

    def _watch_head(self, cluster: Object, pod: Object) -> None:
        ports, meta = ClusterPorts.of(cluster), cluster["metadata"]
        if not is_ready(pod):
            if not answers(f"http://127.0.0.1:{ports.dashboard}/api/gcs_healthz"):
                return
            self._pods.set_ready(pod, True)
        if cluster["spec"].get("enableInTreeAutoscaling"):
            options = cluster["spec"].get("autoscalerOptions", {})
            holder = {"metadata": pod["metadata"], "spec": {"containers": [options]}}
            env = container_env(holder, lambda plural, name: self._objects.find(plural, meta["namespace"], name))
            env |= autoscaler_env(self._place, name_of(pod)) | {"RAY_enable_autoscaler_v2": "1"}
            self._pods.keep_sidecar(pod, autoscaler_argv(meta["name"], meta["namespace"], ports), env)

    def _head(self, cluster: Object) -> Object | None:
        meta = cluster["metadata"]
        heads = self._objects.listed(POD.plural, meta["namespace"], {"ray.io/cluster": meta["name"], "ray.io/node-type": "head"})
        return next((pod for pod in heads if "deletionTimestamp" not in pod["metadata"]), None)

    def _is_outdated(self, cluster: Object, pods: list[Object]) -> bool:
        goal = spec_hash(cluster["spec"])
        return any(pod["metadata"]["annotations"]["ray.io/spec-hash"] != goal for pod in pods if _group(pod) == HEAD_GROUP)

    def _give_ports(self, cluster: Object) -> Object:
        meta = cluster["metadata"]
        status = {"endpoints": ClusterPorts(*free_ports(4)).endpoints(), "state": ""}
        self._objects.set_status(RAY_CLUSTER.plural, meta["namespace"], meta["name"], status)
        return {**cluster, "status": status}

    def _set_status(self, cluster: Object, pods: list[Object]) -> None:
        meta, old = cluster["metadata"], cluster.get("status") or {}
        head = next((pod for pod in pods if _group(pod) == HEAD_GROUP and "deletionTimestamp" not in pod["metadata"]), None)
        workers = [pod for pod in pods if _group(pod) != HEAD_GROUP]
        running = [pod for pod in workers if (pod.get("status") or {}).get("phase") == "Running"]
        met = {"RayClusterProvisioned"} if has_condition(cluster, "RayClusterProvisioned") or is_ready(head) else set()
        met |= {"HeadPodReady"} if is_ready(head) else set()
        status = {
            "endpoints": old["endpoints"],
            "state": "suspended" if cluster["spec"].get("suspend") and not pods else ("ready" if is_ready(head) else old.get("state", "")),
            "conditions": conditions(*met),
            "head": {"podName": name_of(head) if head else "", "podIP": "127.0.0.1"},
            "desiredWorkerReplicas": sum(map(desired_pods, cluster["spec"].get("workerGroupSpecs") or ())),
            "availableWorkerReplicas": len(running),
            "observedGeneration": meta["generation"],
        }
        if {**status, "lastUpdateTime": None} != {**old, "lastUpdateTime": None}:
            self._objects.set_status(RAY_CLUSTER.plural, meta["namespace"], meta["name"], status | {"lastUpdateTime": now()})

    def _delete(self, pod: Object) -> None:
        self._objects.delete(POD.plural, pod["metadata"]["namespace"], name_of(pod))

    def _ray_folder(self, cluster: Object) -> str:
        """Short: the paths of Unix sockets lie in it."""
        used = self._ray_folders
        return used.setdefault(cluster["metadata"]["uid"], f"ray{len(used) or ''}")


def asked_for(pod: Object) -> dict[str, float]:
    """As kube-scheduler counts: a container's requests, where it has none its limits."""
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    amounts: dict[str, float] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources", {})
        for name, quantity in ((resources.get("limits") or {}) | (resources.get("requests") or {})).items():
            amounts[name] = amounts.get(name, 0.0) + float(parse_quantity(str(quantity)))
    return amounts


def answers(url: str, timeout_s: float = 1.0) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _group(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get("ray.io/group", ""))


def is_ready(pod: Object | None) -> bool:
    return has_condition(pod, "Ready")


def _as_autoscaler_reads(cluster: Object) -> dict[str, Any]:
    """Resources and labels by group, derived by Ray itself: the node that comes is the one the autoscaler counted on."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    return dict(_derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"])
