"""A pool under Ray's real autoscaler: empty, until an elastic fine-tune asks for workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster
from adaptfleet.on_ray.kuberay.manifests import read_manifests
from tests.kuberay.training import Run, contract, ray_job, ready_pods

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LOGS = REPOSITORY / "build" / "test-logs" / "pool"
LIMIT_S = 400.0
EVERY_STEPS = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool(embedded_home: Path) -> Iterator[DevCluster]:
    with DevCluster.start(REPOSITORY, {"ADAPTFLEET_HOME": str(embedded_home)}, fleet={"cpu": 4}, logs_to=LOGS) as dev:
        dev.apply(read_manifests(HERE / "pool.yaml"))
        dev.ready("pool")
        yield dev


@pytest.fixture(scope="module")
def tiny(embedded_home: Path) -> dict[str, Any]:
    """A model and data for which a step takes a moment."""
    from tests.serve.tiny_llama import make_base

    base, data = make_base(embedded_home / "tiny"), embedded_home / "tiny.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}", "completion": "{i} it is"}}\n' for i in range(64)))
    return {"model": {"source": str(base), "dtype": "float32"}, "data": {"train": str(data), "test_fraction": 0.1}}


def _status(dev: DevCluster, name: str) -> dict[str, Any]:
    return dict((dev.kube.get("RayJob", name) or {}).get("status") or {})


def _run(dev: DevCluster, home: Path, name: str) -> Run:
    return Run(home, name, lambda: _status(dev, name).get("jobDeploymentStatus") in ("Complete", "Failed"), LIMIT_S)


def test_an_empty_pool_grows_for_a_fine_tune(pool: DevCluster, tiny: dict[str, Any], embedded_home: Path, tmp_path: Path) -> None:
    assert ready_pods(pool.kube, "pool", "spot") + ready_pods(pool.kube, "pool", "steady") == []
    train = {"epochs": 1000, "max_steps": 20000, "pack_tokens": 64, "packs_per_step": 2, "learning_rate": 0.001, "compile": "off"}
    pool.apply([ray_job("comes-and-goes", contract("comes-and-goes", EVERY_STEPS, train=train, **tiny), tmp_path, "pool")])
    run = _run(pool, embedded_home, "comes-and-goes")
    run.steps_of(2, more=EVERY_STEPS + 5)
    # priority 10 against 0: the spot group is filled first
    assert len(ready_pods(pool.kube, "pool", "spot")) == 2
