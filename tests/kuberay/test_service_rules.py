"""The RayService controller alone, its clusters' dashboards and proxies played by small HTTP servers: ways that take a real run too long,
such as back from half an upgrade. `test_service.py` has real clusters."""

import copy
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptfleet.on_ray.kuberay.certificates import Certificates
from adaptfleet.on_ray.kuberay.clusters import SERVE_PORT
from adaptfleet.on_ray.kuberay.gateway import Gateway
from adaptfleet.on_ray.kuberay.manifests import admitted, read_manifests
from adaptfleet.on_ray.kuberay.objects import Objects, conditions, has_condition, owned_by
from adaptfleet.on_ray.kuberay.place import Place
from adaptfleet.on_ray.kuberay.pod_commands import ClusterPorts
from adaptfleet.on_ray.kuberay.ray_services import RayServices

HERE = Path(__file__).parent


class _Cluster(http.server.ThreadingHTTPServer):
    """A dashboard and a proxy in one: keeps the configuration that it is given."""

    daemon_threads = True

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.status = "RUNNING"
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Cluster

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        applications = {app["name"]: {"status": self.server.status, "message": ""} for app in self.server.config.get("applications", ())}
        self._say({"applications": applications})

    def do_PUT(self) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        self.server.config = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._say({})

    def _say(self, thing: dict[str, Any]) -> None:
        body = json.dumps(thing).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _World:
    """The API's objects, and what the cluster controller would make of them."""

    def __init__(self, folder: Path) -> None:
        (folder / "token").write_text("secret")
        self.objects = Objects()
        self.gateway = Gateway()
        self.gateway.start()
        self.services = RayServices(self.objects, Place(folder, "marker", folder, {}, Certificates(folder)), self.gateway)
        self.clusters: dict[str, _Cluster] = {}

    def turn(self, times: int = 1) -> dict[str, Any]:
        for _ in range(times):
            self.services.sync()
            for cluster in self.objects.listed("rayclusters"):
                name = cluster["metadata"]["name"]
                if name not in self.clusters:
                    self._come_up(cluster)
        return dict(self.objects.get("rayservices", "default", "hello")["status"])

    def _come_up(self, cluster: dict[str, Any]) -> None:
        name = cluster["metadata"]["name"]
        server = self.clusters[name] = _Cluster()
        ports = ClusterPorts(1, server.port, 2, 3).endpoints()
        status = {"endpoints": ports, "conditions": conditions("HeadPodReady", "RayClusterProvisioned")}
        self.objects.set_status("rayclusters", "default", name, status)
        labels = {"ray.io/cluster": name, "ray.io/group": "replicas"}
        meta = owned_by(cluster) | {"name": f"{name}-w", "labels": labels, "annotations": {SERVE_PORT: str(server.port)}}
        self.objects.create("pods", {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {}, "status": {"phase": "Running"}})

    def apply(self, service: dict[str, Any]) -> None:
        thing = admitted("rayservices", copy.deepcopy(service))
        if self.objects.find("rayservices", "default", "hello") is None:
            self.objects.create("rayservices", thing)
        else:
            self.objects.change("rayservices", "default", "hello", lambda old: {**old, "spec": thing["spec"]})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[_World]:
    made = _World(tmp_path)
    yield made
    made.gateway.drop(made.gateway.names())
    made.gateway.stop()


def _service(image: str = "one", **options: int) -> dict[str, Any]:
    service = read_manifests(HERE / "service.yaml")[0]
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = image
    service["spec"]["rayClusterDeletionDelaySeconds"] = 0
    if options:
        given = {"maxSurgePercent": 50, "stepSizePercent": 25, "intervalSeconds": 0, "gatewayClassName": "any", **options}
        service["spec"]["upgradeStrategy"] = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": given}
    return service


def _active(status: dict[str, Any]) -> str:
    return str(status["activeServiceStatus"]["rayClusterName"])


def test_a_new_cluster_is_switched_to_only_once_all_its_applications_run(world: _World) -> None:
    world.apply(_service("one"))
    first = _active(world.turn(6))
    config = world.clusters[first].config
    assert config["http_options"] == {"host": "127.0.0.1", "port": 3} and config["applications"][0]["args"] == {"word": "one"}
    world.apply(_service("two"))
    world.turn(2)
    (second,) = set(world.clusters) - {first}
    world.clusters[second].status = "DEPLOYING"
    status = world.turn(6)
    assert _active(status) == first and status["pendingServiceStatus"]["rayClusterName"] == second
    assert has_condition({"status": status}, "UpgradeInProgress") and world.objects.find("rayclusters", "default", first)
    world.clusters[second].status = "RUNNING"
    assert _active(world.turn(3)) == second
    assert world.objects.find("rayclusters", "default", first) is None, "the old cluster goes"


def test_the_application_alone_changes_in_place_and_groups_are_appended(world: _World) -> None:
    service = _service()
    world.apply(service)
    first = _active(world.turn(6))
    service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace("word: one", "word: two")
    group = copy.deepcopy(service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]) | {"groupName": "more"}
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"].append(group)
    world.apply(service)
    status = world.turn(4)
    assert _active(status) == first and status["pendingServiceStatus"] == {} and len(world.clusters) == 1
    assert world.clusters[first].config["applications"][0]["args"] == {"word": "two"}
    groups = world.objects.get("rayclusters", "default", first)["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["replicas", "more"]


def test_an_upgrade_by_steps(world: _World) -> None:
    world.apply(_service("one", maxSurgePercent=50))
    first = _active(world.turn(8))
    world.apply(_service("two", maxSurgePercent=50))
    seen = []
    for _ in range(60):
        status = world.turn()
        if _active(status) != first:
            break
        pending = status["pendingServiceStatus"]
        seen.append((world.clusters[first].config.get("target_capacity"), pending.get("trafficRoutedPercent")))
    assert _active(status) != first and status["pendingServiceStatus"] == {}
    traffic = [percent for _, percent in seen if percent is not None]
    assert sorted(set(traffic)) == [0, 25, 50, 75, 100] and traffic == sorted(traffic)
    assert 50 in [capacity for capacity, _ in seen], "the old cluster gives up capacity on the way"


def test_back_from_half_an_upgrade(world: _World) -> None:
    world.apply(_service("one", maxSurgePercent=50))
    first = _active(world.turn(8))
    world.apply(_service("two", maxSurgePercent=50))
    while world.turn()["pendingServiceStatus"].get("trafficRoutedPercent") != 50:
        pass
    world.apply(_service("one", maxSurgePercent=50))
    assert has_condition({"status": world.turn()}, "RollbackInProgress")
    status = world.turn(40)
    assert _active(status) == first and status["pendingServiceStatus"] == {}
    assert world.clusters[first].config["target_capacity"] == 100
    assert len(world.objects.listed("rayclusters")) == 1 and not has_condition({"status": status}, "RollbackInProgress")


def test_a_third_configuration_goes_back_first_and_then_on(world: _World) -> None:
    world.apply(_service("one", maxSurgePercent=100))
    first = _active(world.turn(8))
    world.apply(_service("two", maxSurgePercent=100))
    while world.turn()["pendingServiceStatus"].get("trafficRoutedPercent") != 25:
        pass
    second = world.turn()["pendingServiceStatus"]["rayClusterName"]
    world.apply(_service("three", maxSurgePercent=100))
    went_back = False
    for _ in range(120):
        status = world.turn()
        went_back = went_back or (_active(status) == first and status["pendingServiceStatus"].get("rayClusterName") != second)
        if _active(status) not in (first, second):
            break
    assert went_back, "the second configuration is never made the active one"
    third = world.objects.get("rayclusters", "default", _active(status))
    assert third["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == "three"
