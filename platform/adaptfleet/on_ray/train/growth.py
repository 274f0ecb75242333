"""How many workers an elastic run has, and when it grows.

Ray Train stops the workers the moment there is room for more, and the new group then waits while the joined node fetches the base and reads
five thousand modules for the first time. A node that is leaving it still takes for room, and waits for it in vain. Here a joined node is
made ready while the workers go on, and a leaving one is no room.
"""

import atexit
import logging
import os
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adaptfleet.contracts.jobs import stored_job
from adaptfleet.on_ray.train.start import imported

logger = logging.getLogger(__name__)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Did not detect any changes")


# Every look at the cluster would be a line of the job's output, where people look for its steps.
logging.getLogger(ElasticScalingPolicy.__module__).addFilter(_is_news)


def make_ready(job: str, needs_bitsandbytes: bool) -> None:
    """On a joined node: what a worker's start would wait for. Fetches the base and reads it once, imports what training needs."""
    # what libraries say of themselves while Python ends is nothing for the run's log
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)
    imported(needs_bitsandbytes)
    from adaptfleet.core.models.loading import base_revision, resolve_model_folder
    from adaptfleet.on_ray.published_models import at_hand

    base_revision(resolve_model_folder(at_hand(stored_job(job).model)))


class ReadyNodes(ElasticScalingPolicy):
    """Room is what stays; new room counts once it is ready."""

    def __init__(self, scaling_config: ScalingConfig, job: str, needs_bitsandbytes: bool) -> None:
        super().__init__(scaling_config)
        self._job, self._needs_bitsandbytes = job, needs_bitsandbytes
        self._made_ready: dict[str, ray.ObjectRef[None]] = {}

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        staying = _staying_nodes()
        return super()._count_possible_workers({node: has for node, has in reserved_resources.items() if node in staying})

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        used = {worker.metadata.node_id for worker in worker_group_state.workers}
        staying = _staying_nodes()
        if decision.num_workers < worker_group_state.num_workers:
            # The workers leave a draining node by themselves, with all saved (worker.py); stopped before that, they would lose steps.
            return NoopDecision() if used - staying else decision
        return decision if self._are_ready((set(self._latest_reserved_resources or {}) & staying) - used) else NoopDecision()

    def _are_ready(self, nodes: set[str]) -> bool:
        """Begins with those that have not begun. One that fails counts as ready: its worker will say why, where failures are counted."""
        for node in nodes - set(self._made_ready):
            logger.info("Node %s has joined: it is made ready before workers start there.", node)
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            # its process ends with it: what it holds in memory is the workers' to have
            task: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(make_ready)
            self._made_ready[node] = task.options(scheduling_strategy=there).remote(self._job, self._needs_bitsandbytes)
        pending = [self._made_ready[node] for node in nodes]
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0) if pending else ([], [])
        return len(ready) == len(pending)


def _staying_nodes() -> set[str]:
    """Nodes that live and are not being drained, by their hex ids."""
    from ray._private.state import state  # where Ray Train looks too; there is no public way

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - set(state.get_draining_nodes() or {})
