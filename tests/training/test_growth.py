"""An elastic run grows onto nodes that are ready and is sized by nodes that stay."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptfleet.contracts.jobs import FinetuneJob
from tests.training.worker_node import WorkerNode


class Busy:
    """Keeps its node from leaving at once."""

    def work(self) -> None:
        pass


@pytest.fixture
def node(small_cluster: Any, tmp_path: Path) -> Iterator[WorkerNode]:
    """Joined to the cluster that this process is connected to."""
    from ray._raylet import AuthenticationTokenLoader

    from adaptfleet.on_ray.joining import connected

    AuthenticationTokenLoader.instance().reset_cache()  # a process reads its cluster's token once
    with connected():
        joined = WorkerNode(small_cluster, 1, tmp_path / "node.log")
        yield joined
        joined.kill()
    AuthenticationTokenLoader.instance().reset_cache()


def _policy(source: str = "smollm2-135m") -> Any:
    from ray.train.v2.api.config import ScalingConfig

    from adaptfleet.on_ray.train.growth import ReadyNodes

    job = FinetuneJob.model_validate({"job": "finetune", "model": {"source": source}, "data": {"train": "address-json"}, "publish": None})
    return ReadyNodes(ScalingConfig(num_workers=(1, 4)), job.model_dump_json(), needs_bitsandbytes=False)


def _wait_until_ready(policy: Any, node: str) -> None:
    began = time.monotonic()
    while not policy._are_ready({node}):
        assert time.monotonic() < began + 120, "the node did not become ready"
        time.sleep(0.1)


def test_a_joined_node_is_made_ready_once(node: WorkerNode) -> None:
    import ray

    policy = _policy()
    assert policy._are_ready(set())
    assert not policy._are_ready({node.node_id})
    _wait_until_ready(policy, node.node_id)
    task = policy._made_ready[node.node_id]
    ray.get(task)
    assert policy._are_ready({node.node_id}) and policy._made_ready[node.node_id] is task


def test_a_node_that_cannot_be_made_ready_is_left_to_its_workers_to_report(node: WorkerNode) -> None:
    import ray

    policy = _policy("./nowhere")
    _wait_until_ready(policy, node.node_id)
    with pytest.raises(ray.exceptions.RayTaskError, match="nowhere"):
        ray.get(policy._made_ready[node.node_id])


def test_a_draining_node_is_no_room_and_nor_is_a_lost_one(node: WorkerNode) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    policy = _policy()
    reserved = {each: {"CPU": 1.0} for each in (node.node_id, ray.get_runtime_context().get_node_id())}
    assert policy._count_possible_workers(reserved) == 2
    busy: Any = ray.remote(num_cpus=1)(Busy)
    actor = busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote()
    ray.get(actor.work.remote())
    node.drain(seconds=60)
    assert ray._private.state.state.get_draining_nodes().keys() == {node.node_id}
    assert policy._count_possible_workers(reserved) == 1
    node.kill()
    end = time.monotonic() + 60
    while node.node_id in ray._private.state.state.get_draining_nodes():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert policy._count_possible_workers(reserved) == 1
