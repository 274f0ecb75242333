"""Who tells elastic runs of the cluster's room looks at it often, and is the one that Ray Train finds."""

import time
from pathlib import Path
from typing import Any

from tests.training.worker_node import WorkerNode


def test_nodes_that_come_and_go_are_seen_by_the_coordinator_that_ray_train_asks(small_cluster: Any, tmp_path: Path) -> None:
    import ray
    from ray._raylet import AuthenticationTokenLoader
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as upstream

    from adaptfleet.on_ray.joining import connected
    from adaptfleet.on_ray.train.coordinator import WatchfulCoordinator, ensure_watchful_coordinator

    # when this fails, the coordinator of ours can go
    assert upstream._AutoscalingCoordinatorActor.TICK_INTERVAL_S > WatchfulCoordinator.TICK_INTERVAL_S

    AuthenticationTokenLoader.instance().reset_cache()  # a process reads its cluster's token once
    try:
        with connected():
            ensure_watchful_coordinator()
            ensure_watchful_coordinator()
            coordinator: Any = upstream.get_or_create_autoscaling_coordinator()
            assert ray.get(coordinator.interval_s.remote()) == WatchfulCoordinator.TICK_INTERVAL_S
            ray.get(coordinator.request_resources.remote("test", [{"CPU": 1}] * 2, 600.0))

            def wait_for_places(count: int) -> None:
                end = time.monotonic() + 60
                while len(ray.get(coordinator.get_reserved_resources.remote("test"))) != count:
                    assert time.monotonic() < end, f"{count} places were not seen"
                    time.sleep(0.2)

            wait_for_places(1)
            node = WorkerNode(small_cluster, 1, tmp_path / "node.log")
            try:
                wait_for_places(2)
            finally:
                node.kill()
            wait_for_places(1)
    finally:
        AuthenticationTokenLoader.instance().reset_cache()
