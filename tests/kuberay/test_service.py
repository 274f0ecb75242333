"""A RayService under load: its head is killed, and nobody is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster
from adaptfleet.on_ray.kuberay.manifests import read_manifests
from adaptfleet.on_ray.kuberay.objects import has_condition
from tests.kuberay.load import Load
from tests.kuberay.training import head_is_ready

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LOGS = REPOSITORY / "build" / "test-logs" / "service"
LIMIT_S = 400.0

pytestmark = pytest.mark.slow


@pytest.fixture
def dev(embedded_home: Path) -> Iterator[DevCluster]:
    with DevCluster.start(REPOSITORY, {"ADAPTFLEET_HOME": str(embedded_home)}, logs_to=LOGS) as made:
        yield made


def _status(dev: DevCluster) -> dict[str, Any]:
    return dict((dev.kube.get("RayService", "hello") or {}).get("status") or {})


def test_a_service_outlives_its_head(dev: DevCluster) -> None:
    service = read_manifests(HERE / "service.yaml")[0]
    dev.apply([service])
    dev.kube.wait(lambda: _status(dev).get("serviceStatus") == "Running", "the service", LIMIT_S)
    first = _status(dev)["activeServiceStatus"]["rayClusterName"]
    with Load(_status(dev)["url"] + "/") as load:
        dev.kube.wait(lambda: load.answers["one from blue"], "answers", LIMIT_S)

        head = head_is_ready(dev.kube, first)
        assert head is not None
        dev.kube.delete("Pod", head, grace_s=0)
        dev.kube.wait(lambda: head_is_ready(dev.kube, first, other_than=head), "another head", LIMIT_S)
        dev.kube.wait(lambda: _applications(dev) == {"hello": "RUNNING"}, "Serve's state", LIMIT_S)
        assert load.failures == []
    assert load.failures == [] and load.sent > 50
    assert has_condition(dev.kube.get("RayService", "hello"), "Ready")


def _applications(dev: DevCluster) -> dict[str, str]:
    found = _status(dev)["activeServiceStatus"].get("applications") or {}
    return {name: state["status"] for name, state in found.items() if isinstance(state, dict)}
