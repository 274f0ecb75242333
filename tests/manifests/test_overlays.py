"""Every overlay that is shipped passes every check, and holds what it is for."""

import pytest

from k8s.validation import crds, entrypoints, fleet, manifests, versions
from k8s.validation.checks import check
from k8s.validation.operator_rules import ray_cluster

NAMES = [str(folder.relative_to(manifests.OVERLAYS)) for folder in manifests.overlays()]


def _context(name: str, built: dict[str, list[manifests.Document]]) -> list[manifests.Document]:
    return built[name.partition("/")[0]] if "/" in name else []


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_is_clean(name: str, built: dict[str, list[manifests.Document]], kuberay: crds.Crds) -> None:
    assert [str(finding) for finding in check(built[name], _context(name, built), kuberay)] == []


def test_the_pins_agree_with_the_locks() -> None:
    assert [str(finding) for finding in versions.pinned()] == []


@pytest.mark.parametrize("name", ["dev-cpu", "staging", "prod"])
def test_a_platform_has_its_parts(name: str, built: dict[str, list[manifests.Document]]) -> None:
    kinds = {manifests.name_of(document) for document in built[name]}
    assert {"RayCluster/train", "RayService/endpoint", "RayCronJob/evaluate-nightly", "NetworkPolicy/deny-all"} <= kinds


@pytest.mark.parametrize("name", NAMES)
def test_every_group_starts_empty_and_may_grow(name: str, built: dict[str, list[manifests.Document]]) -> None:
    """A patch by index that hit the wrong group, or a strategic merge that replaced the list, would show here."""
    for document in built[name]:
        cluster = ray_cluster(document)
        if cluster is None:
            continue
        groups = {group["groupName"]: group for group in cluster[1]["workerGroupSpecs"]}
        expected = {"engine"} if document["kind"] == "RayService" else {"cpu", "gpu-ondemand", "gpu-spot", "gpu-multihost"}
        assert set(groups) == (expected - {"gpu-multihost"} if name.startswith("dev-cpu") else expected)
        assert all(group["minReplicas"] == 0 for group in groups.values())
        assert sum(group["maxReplicas"] for group in groups.values()) > 0


def test_a_jobs_cluster_is_the_pool(built: dict[str, list[manifests.Document]]) -> None:
    """components/own-cluster copies the pool as the overlay sized it."""
    for overlay in ("dev-cpu", "prod"):
        pool = next(document for document in built[overlay] if manifests.name_of(document) == "RayCluster/train")["spec"]
        [job] = built[f"{overlay}/finetune"]
        assert job["spec"]["rayClusterSpec"] == {key: value for key, value in pool.items() if key != "upgradeStrategy"}


def test_a_job_of_production_fits_its_accelerators(built: dict[str, list[manifests.Document]]) -> None:
    [job] = built["prod/finetune"]
    wanted = entrypoints.contract(job["spec"]["entrypoint"])["cluster"]
    spot = next(group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "gpu-spot")
    assert wanted["gpus_per_worker"] == 1
    assert wanted["cpus_per_worker"] <= fleet.group_resources(spot)["CPU"]
