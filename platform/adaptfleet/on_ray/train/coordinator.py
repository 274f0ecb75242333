"""Ray's coordinator of elastic runs, made to look at the cluster more often.

An elastic run asks a coordinator how many workers there is room for (`AutoscalingCoordinator`, an actor that Ray Data and Ray Train share).
Ray 2.60's looks at the cluster's nodes every 20 s: so long a lost node still counts as room, and starts are tried in vain, and a joined one
does not. Ray offers no setting; whoever makes the actor first decides. To go once it does, or learns of nodes at once.
"""

import ray
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as upstream
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAME = "AutoscalingCoordinator"
"""And its namespace's; `get_or_create_autoscaling_coordinator` takes whichever actor has it."""


class WatchfulCoordinator(upstream._AutoscalingCoordinatorActor):
    TICK_INTERVAL_S = 2

    def interval_s(self) -> float:
        return self.TICK_INTERVAL_S


def ensure_watchful_coordinator() -> None:
    """Before Ray Train or Ray Data make theirs; one that is there stays as it is. It outlives the job, as Ray's own does."""
    made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WatchfulCoordinator)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made.options(name=NAME, namespace=NAME, get_if_exists=True, lifetime="detached", scheduling_strategy=here).remote()
