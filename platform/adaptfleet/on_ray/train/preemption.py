"""The look at draining nodes, from the controller itself.

Ray Train 2.60 starts an actor for it with every group of workers: a process whose imports the new workers wait beside, and which then wakes
a hundred times a second to look once. Its watcher is a thread already, so here the controller has that thread.
"""

from collections import defaultdict
from typing import Any

from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.worker_group import WorkerGroup

WITHOUT_RAYS_OWN = {ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0"}


class DrainWatch(PreemptionCallback):
    """Ray Train's callback, with the watcher in this process. Told of a drain, each worker sees it in `ray.train.get_preemption_info`."""

    _watcher: Any

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._stop_watcher()
        ranks: dict[str, list[int]] = defaultdict(list)
        actors: dict[int, Any] = {}
        for worker in worker_group.get_workers():
            assert worker.distributed_context is not None
            rank = worker.distributed_context.world_rank
            ranks[worker.metadata.node_id].append(rank)
            actors[rank] = worker.actor
        self._watcher = PreemptionWatcher(ranks, self._poll_interval_s, actors)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None
