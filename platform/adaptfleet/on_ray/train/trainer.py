"""Ray Train's trainer, with no more processes than a run needs.

Ray Train 2.60 starts four actors beside the workers and their controller, each a process that imports Ray Train and then wakes up a
hundred times a second. Three of them a run can do without, most of the time: see `DrainWatch`, `Unannounced` and `_needless_callbacks`.
Where every core trains, two of them were 2% of a step.
"""

from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.torch.torch_trainer import TorchTrainer

from adaptfleet.on_ray.autoscaler import autoscaler_limits
from adaptfleet.on_ray.train.growth import ReadyNodes
from adaptfleet.on_ray.train.preemption import DrainWatch


class LeanTrainer(TorchTrainer):
    """A TorchTrainer whose elastic runs follow `ReadyNodes`. Ray Train has no way to be given a policy; to go once it does."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        needless = _needless_callbacks()
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, needless)] + [DrainWatch()]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = parts["scaling_policy"]
        if isinstance(policy, ElasticScalingPolicy):
            config = self.train_loop_config or {}
            parts["scaling_policy"] = ReadyNodes(policy.scaling_config, config["job"], config["needs_bitsandbytes"])
        elif autoscaler_limits() == {}:
            parts["scaling_policy"] = Unannounced(policy.scaling_config)
        return super()._initialize_and_run_controller(**parts)


class Unannounced(FixedScalingPolicy):
    """For a cluster without an autoscaler, where an actor would hold a request for nodes that nobody hears."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def _needless_callbacks() -> tuple[type[RayTrainCallback], ...]:
    """One starts a process for Ray Data at each start of the workers, which read the run's folder themselves. Another frees the CPUs of a
    training whose controller is gone while its job goes on, as a search's does; where the training is the whole job, Ray frees them at its
    end."""
    is_whole_job = ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE
    return (DatasetsCallback, PlacementGroupCleanerCallback) if is_whole_job else (DatasetsCallback,)
