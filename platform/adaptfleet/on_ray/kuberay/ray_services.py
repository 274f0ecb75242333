"""RayServices: a cluster for the configuration, its Serve applications, and the way from one cluster to the next without an outage."""

import secrets
import urllib.error
import urllib.request
from typing import Any

import yaml

from adaptfleet.on_ray.kuberay.clusters import SERVE_PORT, spec_hash
from adaptfleet.on_ray.kuberay.dashboard import Dashboard, DashboardError
from adaptfleet.on_ray.kuberay.gateway import Backend, Gateway
from adaptfleet.on_ray.kuberay.objects import (
    POD,
    RAY_CLUSTER,
    RAY_SERVICE,
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
from adaptfleet.on_ray.kuberay.pod_commands import HEAD_GROUP, ClusterPorts
from adaptfleet.on_ray.kuberay.upgrade_steps import Options, Side, is_complete, is_rolled_back, next_capacity, next_traffic

_DELETION_DELAY_S = 60.0
_PROBE_S = 2.0
"""The operator's readiness probe waits so long."""
_HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
_NUM_GROUPS = "ray.io/num-worker-groups"
_ACTIVE, _PENDING = "activeServiceStatus", "pendingServiceStatus"


class RayServices:
    def __init__(self, objects: Objects, place: Place, gateway: Gateway) -> None:
        self._objects = objects
        self._place = place
        self._gateway = gateway
        self._submitted: dict[str, tuple[str, int | None]] = {}
        """Of each cluster, the configuration and the capacity that it was last given."""
        self._unused_since: dict[str, str] = {}

    def sync(self) -> None:
        services = self._objects.listed(RAY_SERVICE.plural)
        self._gateway.drop(self._gateway.names() - {service["metadata"]["uid"] for service in services})
        for service in services:
            status = self._reconciled(service, dict(service.get("status") or {}))
            if status != service.get("status"):
                self._objects.set_status(RAY_SERVICE.plural, service["metadata"]["namespace"], name_of(service), status)

    def _reconciled(self, service: Object, status: Object) -> Object:
        spec = service["spec"]
        status.setdefault("port", free_ports(1)[0])
        status["url"] = f"http://127.0.0.1:{status['port']}"
        active, pending = dict(status.get(_ACTIVE) or {}), dict(status.get(_PENDING) or {})
        self._delete_unused(service, {active.get("rayClusterName"), pending.get("rayClusterName")})
        active_cluster, pending_cluster = self._cluster(service, active), self._cluster(service, pending)
        if pending.get("rayClusterName") and pending_cluster is None:
            pending_cluster = self._create(service, pending["rayClusterName"])
        for cluster in (active_cluster, pending_cluster):
            if cluster is not None and not (cluster is active_cluster and pending_cluster):
                self._add_groups(service, cluster)
        incremental = (spec.get("upgradeStrategy") or {}).get("type") == "NewClusterWithIncrementalUpgrade"
        upgrading = active_cluster is not None and pending_cluster is not None
        rolling_back = incremental and upgrading and self._rolls_back(service, pending_cluster)

        pending_ready = False
        if pending_cluster is not None:
            pending_ready, pending["applications"] = self._served(service, pending_cluster, pending, keeps=rolling_back)
        if active_cluster is not None and (pending_cluster is None or incremental):
            _, active["applications"] = self._served(service, active_cluster, active, keeps=upgrading and not rolling_back)

        if incremental and upgrading and active_cluster is not None and pending_cluster is not None:
            self._step(service, (active, active_cluster), (pending, pending_cluster), pending_ready, rolling_back)
            sides = _side(active, 100), _side(pending, 0)
            if rolling_back and is_rolled_back(*sides, has_condition(pending_cluster, "HeadPodReady")):
                pending, pending_cluster = {}, None
            elif not rolling_back and is_complete(*sides):
                active, active_cluster, pending, pending_cluster = pending, pending_cluster, {}, None
        elif pending_ready and not (incremental and upgrading):
            # The Service's selector switches at once; the old cluster ends its requests until it is deleted.
            active, active_cluster, pending, pending_cluster = pending, pending_cluster, {}, None
            if incremental:
                active |= {"targetCapacity": 100, "trafficRoutedPercent": 100}

        if self._wants_new_cluster(service, active_cluster, pending_cluster):
            pending = {"rayClusterName": f"{name_of(service)}-{secrets.token_hex(3)[:5]}"}
            if incremental:
                pending |= {"targetCapacity": 0, "trafficRoutedPercent": 0} if active else {"targetCapacity": 100}
        endpoints = self._route(service, status["port"], (active, active_cluster), (pending, pending_cluster), incremental)
        met = [name for name, holds in (("Ready", endpoints > 0), ("UpgradeInProgress", bool(active and pending))) if holds]
        return status | {
            _ACTIVE: active,
            _PENDING: pending,
            "numServeEndpoints": endpoints,
            "serviceStatus": "Running" if endpoints else "",
            "conditions": conditions(*met, *(["RollbackInProgress"] if rolling_back else [])),
            "observedGeneration": service["metadata"]["generation"],
        }

    def _served(self, service: Object, cluster: Object, side: Object, keeps: bool) -> tuple[bool, Object]:
        """Gives the cluster its configuration where it has another; whether all applications run, and what is said of them.

        `keeps`: it stays with the configuration that it has, and only its capacity changes.
        """
        if not has_condition(cluster, "HeadPodReady"):
            return False, side.get("applications", {})
        name, capacity, wanted = name_of(cluster), side.get("targetCapacity"), service["spec"]["serveConfigV2"]
        if keeps:
            wanted = self._submitted.get(name, (wanted, None))[0]
        dashboard = self._dashboard(cluster)
        try:
            found = dashboard.applications()
            if self._submitted.get(name) != (wanted, capacity) or not found:
                dashboard.deploy(_for_this_machine(wanted, ClusterPorts.of(cluster), capacity))
                self._submitted[name] = (wanted, capacity)
                return False, found
        except DashboardError as error:
            return False, {"error": str(error)}
        said = {app: {"status": state["status"], "message": state.get("message", "")} for app, state in found.items()}
        return bool(found) and all(state["status"] == "RUNNING" for state in found.values()), said

    def _step(
        self, service: Object, active: tuple[Object, Object], pending: tuple[Object, Object], pending_ready: bool, rolling_back: bool
    ) -> None:
        given = service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]
        options = Options(given.get("maxSurgePercent", 100), given["stepSizePercent"], given["intervalSeconds"])
        sides = _side(active[0], 100), _side(pending[0], 0)
        grown = active[0] if rolling_back else pending[0]
        moved = grown.get("lastTrafficMigratedTime")
        weights = next_traffic(*sides, options, seconds_since(moved) if moved else None, pending_ready, rolling_back)
        if weights != (sides[0].traffic, sides[1].traffic):
            active[0]["trafficRoutedPercent"], pending[0]["trafficRoutedPercent"] = weights
            grown["lastTrafficMigratedTime"] = now()
            return
        change = next_capacity(*sides, options.surge, rolling_back)
        if change is not None and has_condition(pending[1], "HeadPodReady"):
            # Serve is told at the next look, before traffic moves: a cluster that has just got its configuration is not ready.
            (active if change[0] == "active" else pending)[0]["targetCapacity"] = change[1]

    def _route(
        self, service: Object, port: int, active: tuple[Object, Object | None], pending: tuple[Object, Object | None], incremental: bool
    ) -> int:
        backends, number = [], 0
        for (side, cluster), default in ((active, 100), (pending, 0)):
            if cluster is None or (not incremental and default == 0):
                continue
            ports = self._endpoints(service, cluster)
            number += len(ports)
            weight = side.get("trafficRoutedPercent", default) if incremental and pending[1] is not None else default
            backends.append(Backend(weight, ports))
        self._gateway.route(service["metadata"]["uid"], port, tuple(backends))
        return number

    def _endpoints(self, service: Object, cluster: Object) -> tuple[int, ...]:
        """Proxies that take requests: the readiness probe of `k8s/base/serve`, and what gives the head its serve label."""
        pods = self._objects.listed(POD.plural, cluster["metadata"]["namespace"], {"ray.io/cluster": name_of(cluster)})
        found = []
        for pod in pods:
            is_head = pod["metadata"]["labels"]["ray.io/group"] == HEAD_GROUP
            if (is_head and service["spec"].get("excludeHeadPodFromServeSvc")) or "deletionTimestamp" in pod["metadata"]:
                continue
            port = int(pod["metadata"]["annotations"][SERVE_PORT])
            if (pod.get("status") or {}).get("phase") == "Running" and _takes_requests(port, is_head):
                found.append(port)
        return tuple(found)

    def _wants_new_cluster(self, service: Object, active: Object | None, pending: Object | None) -> bool:
        if active is None and pending is None:
            return not ((service.get("status") or {}).get(_PENDING) or {}).get("rayClusterName")
        newest = pending or active
        if newest is None or _same(service, newest) or _grew(service, newest):
            return False
        # Of a third configuration amid an upgrade: first back to the old cluster, then on.
        return pending is None and (service["spec"].get("upgradeStrategy") or {}).get("type") != "None"

    def _rolls_back(self, service: Object, pending: Object | None) -> bool:
        """The goal is no longer what the new cluster was made for."""
        return pending is not None and not _same(service, pending) and not _grew(service, pending)

    def _add_groups(self, service: Object, cluster: Object) -> None:
        """Worker groups that were appended come without a new cluster."""
        if _same(service, cluster) or not _grew(service, cluster):
            return
        goal = service["spec"]["rayClusterConfig"]
        number = int(cluster["metadata"]["annotations"][_NUM_GROUPS])

        def edit(thing: Object) -> None:
            thing["spec"]["workerGroupSpecs"] += goal["workerGroupSpecs"][number:]
            thing["metadata"]["annotations"] |= _hashes(goal)

        self._objects.change(RAY_CLUSTER.plural, cluster["metadata"]["namespace"], name_of(cluster), edit)

    def _create(self, service: Object, name: str) -> Object:
        meta, config = service["metadata"], service["spec"]["rayClusterConfig"]
        labels = meta.get("labels", {}) | {"ray.io/originated-from-crd": "RayService", "ray.io/originated-from-cr-name": meta["name"]}
        made = owned_by(service) | {"name": name, "labels": labels, "annotations": _hashes(config)}
        cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": made, "spec": config}
        return self._objects.create(RAY_CLUSTER.plural, cluster)

    def _delete_unused(self, service: Object, used: set[str | None]) -> None:
        """After a delay, in which requests under way end."""
        meta, delay_s = service["metadata"], service["spec"].get("rayClusterDeletionDelaySeconds", _DELETION_DELAY_S)
        labels = {"ray.io/originated-from-crd": "RayService", "ray.io/originated-from-cr-name": meta["name"]}
        for cluster in self._objects.listed(RAY_CLUSTER.plural, meta["namespace"], labels):
            name = name_of(cluster)
            if name in used:
                continue
            if seconds_since(self._unused_since.setdefault(name, now())) >= delay_s:
                self._objects.delete(RAY_CLUSTER.plural, meta["namespace"], name)
                self._submitted.pop(name, None)

    def _cluster(self, service: Object, side: Object) -> Object | None:
        return self._objects.find(RAY_CLUSTER.plural, service["metadata"]["namespace"], side.get("rayClusterName", ""))

    def _dashboard(self, cluster: Object) -> Dashboard:
        return Dashboard(f"http://127.0.0.1:{ClusterPorts.of(cluster).dashboard}", self._place.folder / "token")


def _side(status: Object, default: int) -> Side:
    return Side(status.get("targetCapacity", default), status.get("trafficRoutedPercent", default))


def _takes_requests(port: int, is_head: bool) -> bool:
    """A worker's proxy without a replica holds requests; of the head the operator wants 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthz", timeout=_PROBE_S) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        return not is_head and b"drained" not in error.read()
    except OSError:
        return False


def _hashes(config: Object) -> dict[str, str]:
    return {_HASH: spec_hash(config), _NUM_GROUPS: str(len(config.get("workerGroupSpecs") or ()))}


def _same(service: Object, cluster: Object) -> bool:
    return bool(cluster["metadata"]["annotations"][_HASH] == spec_hash(service["spec"]["rayClusterConfig"]))


def _grew(service: Object, cluster: Object) -> bool:
    """It differs in groups at the end alone."""
    goal, number = service["spec"]["rayClusterConfig"], int(cluster["metadata"]["annotations"][_NUM_GROUPS])
    shortened = goal | {"workerGroupSpecs": (goal.get("workerGroupSpecs") or [])[:number]}
    return bool(cluster["metadata"]["annotations"][_HASH] == spec_hash(shortened))


def _for_this_machine(config: str, ports: ClusterPorts, capacity: int | None) -> dict[str, Any]:
    """Serve on the loopback address and the cluster's own port, whatever the manifest says of a pod's."""
    served = dict(yaml.safe_load(config))
    served["http_options"] = {**(served.get("http_options") or {}), "host": "127.0.0.1", "port": ports.serve}
    return served | ({"target_capacity": capacity} if capacity is not None else {})
