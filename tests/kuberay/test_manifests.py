"""What a bed refuses, and the defaults that it fills in."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptfleet.contracts.errors import ContractError
from adaptfleet.on_ray.kuberay.clusters import desired_pods, spec_hash, surplus
from adaptfleet.on_ray.kuberay.manifests import admitted, plural_of, read_manifests
from adaptfleet.on_ray.kuberay.pod_commands import ClusterPorts, MissingReferenceError, container_env, head_argv, with_redis_login

HERE = Path(__file__).parent


def _pool() -> dict[str, Any]:
    return dict(yaml.safe_load((HERE / "pool.yaml").read_text()))


def test_defaults_of_the_crd() -> None:
    group = admitted("rayclusters", _pool())["spec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["numOfHosts"], group["scaleStrategy"]) == (0, 1, {})


def test_all_that_is_wrong_is_said_at_once() -> None:
    pool = _pool()
    pool["spec"]["autoscalerOptions"]["version"] = "v1"
    pool["spec"]["workerGroupSpecs"][0]["minReplicas"] = 5
    pool["spec"]["workerGroupSpecs"][1]["groupName"] = "steady"
    with pytest.raises(ValueError) as caught:
        admitted("rayclusters", pool)
    assert all(word in str(caught.value) for word in ("v1", "above maxReplicas", "2 groups named 'steady'"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"submissionMode": "HttpMode"}, "HttpMode"),
        ({"entrypoint": ""}, "entrypoint"),
        ({"deletionStrategy": {"deletionRules": [{"policy": "DeleteAll", "condition": {"jobStatus": "FAILED"}}]}}, "DeleteAll"),
        ({"deletionStrategy": {"onSuccess": {"policy": "DeleteCluster"}}}, "deprecated"),
        ({"rayClusterSpec": None}, "clusterSelector"),
        ({"clusterSelector": {"ray.io/cluster": "x"}, "backoffLimit": 1}, "not tried again"),
    ],
)
def test_a_wrong_job(change: dict[str, Any], word: str) -> None:
    spec = {"entrypoint": "python x.py", "rayClusterSpec": _pool()["spec"], **change}
    with pytest.raises(ValueError, match=word):
        admitted("rayjobs", {"spec": spec})


def test_a_step_above_the_surge() -> None:
    service = yaml.safe_load((HERE / "service.yaml").read_text())
    options = {"maxSurgePercent": 10, "stepSizePercent": 20, "intervalSeconds": 1, "gatewayClassName": "any"}
    service["spec"]["upgradeStrategy"] = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    with pytest.raises(ValueError, match="above maxSurgePercent"):
        admitted("rayservices", service)


def test_a_hash_sees_templates_and_not_sizes() -> None:
    pool = admitted("rayclusters", _pool())["spec"]
    before = spec_hash(pool)
    pool["workerGroupSpecs"][0] |= {"replicas": 2, "scaleStrategy": {"workersToDelete": ["x"]}}
    assert spec_hash(pool) == before
    pool["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] = "other"
    assert spec_hash(pool) != before


def test_who_goes() -> None:
    """With an autoscaler only it decides; a failed pod goes first, and nothing else in that look."""
    group = {"replicas": 1, "minReplicas": 0, "maxReplicas": 3, "numOfHosts": 1, "scaleStrategy": {"workersToDelete": ["b"]}}
    pods = [{"metadata": {"name": name}, "status": {"phase": "Running"}} for name in "abc"]
    assert surplus(group, pods, autoscaled=True) == ["b"]
    assert surplus(group, pods, autoscaled=False) == ["b", "c"]
    assert surplus(group | {"suspend": True}, pods, autoscaled=True) == ["a", "b", "c"] and desired_pods(group | {"suspend": True}) == 0
    pods[0]["status"]["phase"] = "Failed"
    assert surplus(group, pods, autoscaled=True) == ["a"]
    assert desired_pods(group | {"replicas": 9, "numOfHosts": 4}) == 12


def test_variables_of_a_container() -> None:
    env = [
        {"name": "PLAIN", "value": "1"},
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POOL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['ray.io/group']"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "one"}}},
        {"name": "MAYBE", "valueFrom": {"configMapKeyRef": {"name": "absent", "key": "x", "optional": True}}},
    ]
    container: dict[str, Any] = {"envFrom": [{"configMapRef": {"name": "all"}}], "env": env}
    pod = {"metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"ray.io/group": "g"}}, "spec": {"containers": [container]}}
    kept: dict[tuple[str, str], dict[str, Any]] = {
        ("configmaps", "all"): {"data": {"A": "a", "PLAIN": "0"}},
        ("secrets", "keys"): {"data": {"one": "c2VjcmV0"}},
    }
    found = container_env(pod, lambda plural, name: kept.get((plural, name)))
    assert found == {"A": "a", "PLAIN": "1", "NAME": "p", "POOL": "g", "KEY": "secret"}
    container["envFrom"][0]["configMapRef"]["name"] = "missing"
    with pytest.raises(MissingReferenceError, match="missing"):
        container_env(pod, lambda plural, name: kept.get((plural, name)))


def test_a_head_is_told_how_to_log_in_at_redis() -> None:
    secret = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    cluster = {"spec": {"gcsFaultToleranceOptions": {"backend": "redis", "redisAddress": "redis:6379", "redisPassword": secret}}}
    pod = {"metadata": {"name": "head", "namespace": "n", "uid": "u"}, "spec": {"containers": [{"name": "ray-head"}]}}
    env = container_env(with_redis_login(pod, cluster), lambda plural, name: {"data": {"password": "c2VjcmV0"}})
    assert env == {"REDIS_PASSWORD": "secret"}
    node = {"resources": {"CPU": 0}, "labels": {}}
    assert "--redis-password=secret" in head_argv({}, node, ClusterPorts(1, 2, 3, 4), Path("ray"), env)
    assert "env" not in pod["spec"]["containers"][0]


def test_files_that_are_no_manifests(tmp_path: Path) -> None:
    for text in ("a: [", "just: words", "- a list"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ContractError, match=r"x\.yaml"):
            read_manifests(tmp_path / "x.yaml")
    with pytest.raises(ContractError, match="does not exist"):
        read_manifests(tmp_path / "none")


def test_plurals() -> None:
    kinds = ("RayCluster", "RayService", "NetworkPolicy", "Gateway", "PriorityClass", "Ingress", "Pod", "StorageClass")
    assert [plural_of(kind) for kind in kinds] == [
        "rayclusters", "rayservices", "networkpolicies", "gateways", "priorityclasses", "ingresses", "pods", "storageclasses",
    ]  # fmt: skip
