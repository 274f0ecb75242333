"""Components that no shipped overlay uses, put together: they build, and all that is said of them is the gate that each needs."""

import os
from pathlib import Path

import pytest

from k8s.validation import crds, manifests
from k8s.validation.checks import check

K8S = manifests.ROOT / "k8s"
PLATFORM = ["base/namespace", "base/train-cluster", "base/serve", "base/eval-cronjob"]


def _built(folder: Path, resources: list[str], components: list[str]) -> list[manifests.Document]:
    def paths(names: list[str]) -> str:
        return "".join(f"  - {os.path.relpath(K8S / name, folder)}\n" for name in names)

    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: adaptfleet\n"
        f"resources:\n{paths(resources)}components:\n{paths(components)}"
    )
    return manifests.build(folder)


@pytest.mark.parametrize(
    ("components", "says"),
    [
        (["components/gcs-ft-rocksdb"], "GCSFaultToleranceEmbeddedStorage"),
        (["components/tls", "components/auth-token"], "RayClusterMTLS"),
        (["components/spot", "components/s3", "components/hf-cache", "components/hf-cache/mounts", "components/monitoring"], None),
    ],
    ids=["rocksdb", "tls", "spot"],
)
def test_components_of_a_platform(components: list[str], says: str | None, tmp_path: Path, kuberay: crds.Crds) -> None:
    found = check(_built(tmp_path, PLATFORM, components), [], kuberay)
    assert [str(finding) for finding in found if says is None or says not in str(finding)] == []
    assert bool(found) == (says is not None)


def test_jobs_in_a_queue_of_volcanos(tmp_path: Path, kuberay: crds.Crds) -> None:
    (tmp_path / "platform").mkdir()
    (tmp_path / "job").mkdir()
    platform = _built(tmp_path / "platform", PLATFORM, [])
    queues = _built(tmp_path / "job", ["base/finetune-job"], ["components/own-cluster", "components/volcano/job", "components/volcano"])
    for document in queues:
        if document["kind"] == "Queue":
            document["metadata"].pop("namespace")  # kustomize gives one to every kind it does not know
    found = [str(finding) for finding in check(queues, platform, kuberay)]
    assert len(found) == 1 and "is not the batchScheduler" in found[0], found
