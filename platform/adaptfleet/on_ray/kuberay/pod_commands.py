"""What a Ray pod runs here: the operator's `ray start`, with loopback addresses and this bed's ports and folder in place of a pod's own."""

import base64
import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptfleet.on_ray.cluster.submission import ray_command
from adaptfleet.on_ray.kuberay.objects import Object
from adaptfleet.on_ray.kuberay.place import Place

HEAD_GROUP = "headgroup"
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_OURS = {
    "port", "dashboard-host", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
    "node-manager-port", "object-manager-port", "runtime-env-agent-port", "ray-client-server-port", "node-ip-address", "temp-dir",
    "block", "head", "address", "num-cpus", "num-gpus", "memory", "resources", "labels", "no-monitor", "include-dashboard",
    "min-worker-port", "max-worker-port", "worker-port-list", "plasma-directory",
}  # fmt: skip
"""Parameters of `ray start` that belong to this machine, or that are derived as the autoscaler derives them."""
_PORTS_OF_EACH_NODE = (
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "node-manager-port", "object-manager-port", "runtime-env-agent-port",
    "metrics-export-port",
)  # fmt: skip


@dataclass(frozen=True)
class ClusterPorts:
    """Of a RayCluster's head, and its Service's: kept when the head is replaced."""

    gcs: int
    dashboard: int
    client: int
    serve: int

    @classmethod
    def of(cls, cluster: Object) -> "ClusterPorts":
        ports = cluster["status"]["endpoints"]
        return cls(*(int(ports[name]) for name in ("gcs-server", "dashboard", "client", "serve")))

    def endpoints(self) -> dict[str, str]:
        """As the operator writes them into the status."""
        return {"gcs-server": str(self.gcs), "dashboard": str(self.dashboard), "client": str(self.client), "serve": str(self.serve)}


_REDIS_LOGIN = {"REDIS_USERNAME": ("redisUsername", "redis-username"), "REDIS_PASSWORD": ("redisPassword", "redis-password")}
"""Variables of a head's pod: where the manifest has them, and how `ray start` is told."""


def head_argv(group: Object, node: Object, ports: ClusterPorts, ray_folder: Path, env: Mapping[str, str]) -> list[str]:
    """`node` is the group as Ray's autoscaler reads it: resources and labels. `env` is the pod's."""
    argv = [
        *ray_command(),
        "start",
        "--head",
        "--block",
        "--no-monitor",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
    ]
    argv += [f"--port={ports.gcs}", f"--dashboard-port={ports.dashboard}", f"--ray-client-server-port={ports.client}"]
    argv += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--temp-dir={ray_folder}"]
    argv += [f"--{option}={env[name]}" for name, (_, option) in _REDIS_LOGIN.items() if name in env]
    return argv + _node_arguments(group, node)


def worker_argv(group: Object, node: Object, ports: ClusterPorts, ray_folder: Path) -> list[str]:
    argv = [sys.executable, "-m", "adaptfleet.on_ray.kuberay.ray_start", "start", "--block", f"--address=127.0.0.1:{ports.gcs}"]
    argv += [f"--temp-dir={ray_folder}", "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--log-style=record", "--log-color=false"]
    return argv + _node_arguments(group, node)


def autoscaler_argv(cluster: str, namespace: str, ports: ClusterPorts) -> list[str]:
    argv = [*ray_command(), "kuberay-autoscaler", f"--cluster-name={cluster}", f"--cluster-namespace={namespace}"]
    return [*argv, f"--gcs-address=127.0.0.1:{ports.gcs}"]


def autoscaler_env(place: Place, head_pod: str) -> dict[str, str]:
    certificate, key = place.certificates.client
    return {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(place.api_port),
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(key),
        "RAY_KUBERAY_CA_CERT_PATH": str(place.certificates.authority),
        "RAY_HEAD_POD_NAME": head_pod,
        "KUBERAY_CRD_VER": "v1",
    }


def _node_arguments(group: Object, node: Object) -> list[str]:
    resources = dict(node["resources"])
    argv = [f"--{name}=0" for name in _PORTS_OF_EACH_NODE]
    argv += [f"--num-cpus={resources.pop('CPU')}", f"--num-gpus={resources.pop('GPU', 0)}"]
    if "memory" in resources:
        argv.append(f"--memory={resources.pop('memory')}")
    if resources:
        argv.append(f"--resources={json.dumps(resources)}")
    if node["labels"]:
        argv.append("--labels=" + ",".join(f"{key}={value}" for key, value in node["labels"].items()))
    own = {"object-store-memory": str(_OBJECT_STORE_BYTES)} | group.get("rayStartParams", {})
    return argv + [f"--{name}={value}" for name, value in own.items() if name not in _OURS]


def ray_env(cluster: Object, group_name: str, pod_name: str, serve_port: int, folder: Path) -> dict[str, str]:
    """What the operator puts into the Ray container (`common/pod.go`, v1.7.0), less what is an address of a pod."""
    meta, is_head = cluster["metadata"], group_name == HEAD_GROUP
    env = {
        "RAY_CLUSTER_NAME": meta["name"],
        "RAY_CLUSTER_NAMESPACE": meta["namespace"],
        "RAY_CLOUD_INSTANCE_ID": pod_name,
        "RAY_NODE_TYPE_NAME": group_name,
        "RAY_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
    }
    if not is_head:
        # Pods share one address here: each worker's proxy needs a port of its own.
        env["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(serve_port)
    if meta.get("labels", {}).get("ray.io/originated-from-crd") == "RayService":
        env |= {
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
        }
    tolerance = cluster["spec"].get("gcsFaultToleranceOptions")
    if tolerance is not None and not is_head:
        env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    if tolerance is not None and is_head:
        env |= _storage_env(tolerance, meta["uid"], folder)
    return env


def _storage_env(tolerance: Object, uid: str, folder: Path) -> dict[str, str]:
    if tolerance.get("backend") == "rocksdb":
        return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs" / uid)}
    return {
        "RAY_REDIS_ADDRESS": tolerance["redisAddress"],
        "RAY_external_storage_namespace": tolerance.get("externalStorageNamespace") or uid,
    }


def with_redis_login(pod: Object, cluster: Object) -> Object:
    """The head's pod as the operator makes it of `gcsFaultToleranceOptions`, with what Redis asks for in its environment."""
    tolerance = cluster["spec"].get("gcsFaultToleranceOptions") or {}
    login = [{"name": name, **tolerance[key]} for name, (key, _) in _REDIS_LOGIN.items() if key in tolerance]
    made = copy.deepcopy(pod)
    made["spec"]["containers"][0].setdefault("env", []).extend(login)
    return made


class MissingReferenceError(Exception):
    """A ConfigMap, Secret or key that a container names and nobody made."""


def container_env(pod: Object, find: Callable[[str, str], Object | None], container: int = 0) -> dict[str, str]:
    """The variables of a container, with what they refer to. `find` gives a ConfigMap or Secret by plural and name.

    MissingReferenceError: the pod cannot start, as a kubelet would say.
    """
    spec = pod["spec"]["containers"][container]
    env: dict[str, str] = {}
    for source in spec.get("envFrom", ()):
        for key, plural in (("configMapRef", "configmaps"), ("secretRef", "secrets")):
            if key in source:
                found = _referred(find, plural, source[key])
                env |= {f"{source.get('prefix', '')}{name}": value for name, value in (found or {}).items()}
    for entry in spec.get("env", ()):
        value = entry.get("value", "") if "valueFrom" not in entry else _value_from(entry["valueFrom"], pod, find)
        if value is not None:
            env[entry["name"]] = value
    return env


def _value_from(source: Object, pod: Object, find: Callable[[str, str], Object | None]) -> str | None:
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    for key, plural in (("configMapKeyRef", "configmaps"), ("secretKeyRef", "secrets")):
        if key in source:
            values = _referred(find, plural, source[key])
            if values is None or (source[key]["key"] not in values and source[key].get("optional")):
                return None
            if source[key]["key"] not in values:
                raise MissingReferenceError(f"{plural} {source[key]['name']!r} has no key {source[key]['key']!r}")
            return values[source[key]["key"]]
    return None


def _referred(find: Callable[[str, str], Object | None], plural: str, reference: Object) -> dict[str, str] | None:
    found = find(plural, reference["name"])
    if found is None:
        if reference.get("optional"):
            return None
        raise MissingReferenceError(f"{plural} {reference['name']!r} not found")
    values: dict[str, str] = dict(found.get("data") or {})
    if plural == "secrets":
        values = {key: base64.b64decode(value).decode() for key, value in values.items()} | dict(found.get("stringData") or {})
    return values


def _field(pod: Object, path: str) -> str | None:
    meta: Mapping[str, str] = pod["metadata"]
    if path.startswith("metadata.labels['"):
        return pod["metadata"].get("labels", {}).get(path[len("metadata.labels['") : -2])
    known = {"metadata.name": meta["name"], "metadata.namespace": meta["namespace"], "metadata.uid": meta["uid"]}
    return known.get(path, "127.0.0.1" if path in ("status.podIP", "status.hostIP") else None)
