"""A pool under Ray's real autoscaler: empty, grown by a fine-tune, its room taken and given back, a node lost, empty again."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptfleet.on_ray.cluster.processes import members
from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster
from adaptfleet.on_ray.kuberay.manifests import read_manifests
from tests.cluster.test_local_cluster import _is_loopback, _listening
from tests.kuberay.training import Run, contract, head_is_ready, ray_job, ready_pods

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


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _endpoint() -> list[dict[str, Any]]:
    """A head alone, of a class of its own."""
    service = read_manifests(HERE / "pool.yaml")[0]
    service["metadata"]["name"] = "endpoint"
    service["spec"] |= {"workerGroupSpecs": [], "enableInTreeAutoscaling": False}
    pod = service["spec"]["headGroupSpec"]["template"]["spec"]
    pod["priorityClassName"] = "serving"
    pod["containers"][0]["resources"] = {"requests": {"cpu": "2"}, "limits": {"memory": "2Gi"}}
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "serving"}, "value": 1000}
    return [kind, service]


def _next_start(run: Run, after: float) -> tuple[int, float]:
    """Of the next group of workers: steps that it makes again, and when it began."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        for line in run.lines("start"):
            if line["at"] > after:
                return int(line["redone"]), float(line["at"])
        time.sleep(0.2)
    raise AssertionError("training did not start again")


def test_spot_nodes_come_and_go_under_a_fine_tune(pool: DevCluster, tiny: dict[str, Any], embedded_home: Path, tmp_path: Path) -> None:
    assert ready_pods(pool.kube, "pool", "spot") + ready_pods(pool.kube, "pool", "steady") == []
    train = {"epochs": 1000, "max_steps": 20000, "pack_tokens": 64, "packs_per_step": 2, "learning_rate": 0.001, "compile": "off"}
    pool.apply([ray_job("comes-and-goes", contract("comes-and-goes", EVERY_STEPS, train=train, **tiny), tmp_path, "pool")])
    run = _run(pool, embedded_home, "comes-and-goes")
    run.steps_of(2, more=EVERY_STEPS + 5)
    # priority 10 against 0: the spot group is asked first
    assert len(ready_pods(pool.kube, "pool", "spot")) == 2 and ready_pods(pool.kube, "pool", "steady") == []
    # The training workers' rendezvous is PyTorch's, which listens everywhere it can.
    nodes = {process.pid for process in members(None, pool.marker) if not _title(process.pid).startswith("ray::RayTrainWorker")}
    addresses = _listening(nodes)
    assert addresses and all(_is_loopback(address) for address in addresses), addresses

    # An endpoint comes that counts for more: the fleet has four CPUs, the pool holds three of them, and it wants two.
    at = time.time()
    pool.apply(_endpoint())
    pool.kube.wait(lambda: head_is_ready(pool.kube, "endpoint"), "the endpoint", LIMIT_S)
    assert len(ready_pods(pool.kube, "pool", "spot")) == 1
    redone, began = _next_start(run, at)
    assert redone == 0, "it had its notice"
    run.steps_of(1, after=began, more=5)

    # It goes, and training takes its room again.
    pool.kube.delete("RayCluster", "endpoint")
    grown = run.steps_of(2, after=began, more=EVERY_STEPS + 5)
    assert grown["num_workers"] == 2

    lost, at = ready_pods(pool.kube, "pool", "spot")[0], time.time()
    pool.kube.delete("Pod", lost, grace_s=0)
    redone, began = _next_start(run, at)
    assert redone <= EVERY_STEPS
    run.steps_of(2, after=began, more=5)
    assert lost not in ready_pods(pool.kube, "pool", "spot")
    steps = [line["step"] for line in run.lines("train")]
    assert steps == list(range(1, len(steps) + 1)), "each step is in the record once"

    pool.kube.delete("RayJob", "comes-and-goes")
    pool.kube.wait(lambda: not pool.kube.pods("pool", "spot"), "an empty pool", LIMIT_S)
    assert pool.kube.get("RayJob", "comes-and-goes") is None and len(pool.kube.pods("pool")) == 1


def test_a_job_is_tried_again_and_ends_at_its_deadline(pool: DevCluster, tmp_path: Path) -> None:
    """The programs ask for no worker: heads are enough."""
    tries = tmp_path / "tries"
    script = f"import sys; p = open({str(tries)!r}, 'a+'); p.write('x'); p.seek(0); sys.exit(len(p.read()) < 2)"
    again = ray_job("again", {}, tmp_path, "", backoffLimit=2, rayClusterSpec=read_manifests(HERE / "pool.yaml")[0]["spec"])
    del again["spec"]["clusterSelector"]
    again["spec"]["rayClusterSpec"] |= {"workerGroupSpecs": [], "enableInTreeAutoscaling": False}
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}}
    again["spec"] |= {"entrypoint": f'python -c "{script}"', "deletionStrategy": {"deletionRules": [rule]}}
    late = ray_job("late", {}, tmp_path, "pool", activeDeadlineSeconds=8)
    late["spec"]["entrypoint"] = "sleep 600"
    pool.apply([again, late])
    pool.kube.wait(lambda: _status(pool, "again").get("jobDeploymentStatus") == "Complete", "the end of the second try", LIMIT_S)
    assert _status(pool, "again")["failed"] == 1 and tries.read_text() == "xx"
    own = _status(pool, "again")["rayClusterName"]
    pool.kube.wait(lambda: not pool.kube.pods(own), "the end of its cluster", LIMIT_S)
    pool.kube.wait(lambda: _status(pool, "late").get("jobDeploymentStatus") == "Failed", "the deadline", LIMIT_S)
    assert _status(pool, "late")["reason"] == "DeadlineExceeded" and len(pool.kube.pods("pool")) == 1
    pool.kube.delete("RayJob", "late")
    pool.kube.wait(lambda: pool.kube.get("RayJob", "late") is None, "the job's end", LIMIT_S)
