"""The part of a fine-tune that runs on the cluster."""

import os

import ray
from ray.train.v2._internal import constants
from ray.train.v2.api.config import (  # ray.train's own names are typed as the old ones
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import ClusterSpec, FinetuneJob
from adaptfleet.on_ray.autoscaler import autoscaler_limits
from adaptfleet.on_ray.distill.scoring import score_rows
from adaptfleet.on_ray.joining import connected
from adaptfleet.on_ray.train.coordinator import ensure_watchful_coordinator
from adaptfleet.on_ray.train.failures import FailureCount
from adaptfleet.on_ray.train.few_bits import needs_bitsandbytes
from adaptfleet.on_ray.train.places import equal_share, shortage
from adaptfleet.on_ray.train.preemption import WITHOUT_RAYS_OWN
from adaptfleet.on_ray.train.progress import ProgressTeller
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.train.start import train_worker
from adaptfleet.on_ray.train.trainer import LeanTrainer

# Ray Train looks at its workers and at draining nodes rarely; a lost worker or a notice should cost seconds. At a look it takes one
# checkpoint's report, so that a run with many ends later by so many looks.
_WATCHFUL = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # how long to wait for the place of a lost node before going on with fewer workers
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    **WITHOUT_RAYS_OWN,
}


def fit(job: FinetuneJob, folder: RunFolder) -> None:
    """Trains on Ray's workers. A run of the same name goes on from its last checkpoint."""
    for name, value in _WATCHFUL.items():
        os.environ.setdefault(name, value)
    cluster = job.cluster
    with connected():
        _tell_ray_trains_actors_their_cluster()
        cpus, gpus = worker_resources(cluster)
        if not isinstance(cluster.workers, int):
            ensure_watchful_coordinator()
        if isinstance(job.objective, Distillation) and job.objective.source.kind == "offline":
            score_rows(job, folder, cpus, gpus)
        trainer = LeanTrainer(
            train_worker,
            train_loop_config={
                "job": job.model_dump_json(),
                "folder": str(folder.path),
                "num_cpus": cpus,
                "needs_bitsandbytes": needs_bitsandbytes(job, folder),
            },
            scaling_config=ScalingConfig(
                num_workers=cluster.workers if isinstance(cluster.workers, int) else (cluster.min_workers, cluster.max_workers),
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
                elastic_resize_monitor_interval_s=cluster.resize_check_interval_s,
            ),
            run_config=RunConfig(
                name=job.run_name(),
                storage_path=str(folder.path.parent),
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[FailureCount(folder.path, cluster.max_failures)],
                checkpoint_config=CheckpointConfig(num_to_keep=job.checkpoint.keep),
            ),
        )
        with ProgressTeller(folder):
            trainer.fit()


def _tell_ray_trains_actors_their_cluster() -> None:
    """The one that frees the CPUs of a training whose driver is gone asks Ray's state API, which looks for a cluster on this machine and
    gives up where it finds two: the CPUs then stay taken (Ray 2.60, `placement_group_cleaner.py`)."""
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def worker_resources(cluster: ClusterSpec) -> tuple[int, float]:
    """CPUs and GPUs of one worker: what the contract says, else an equal share of what is free now.

    ContractError when the fewest workers asked for do not fit the cluster, now or by growing.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = cluster.min_workers
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(total.get("GPU", 0) >= workers)
    cpus = cluster.cpus_per_worker or equal_share(cluster.max_workers, free.get("CPU", 0), nodes)
    reason = shortage(workers, {"CPU": cpus, "GPU": gpus}, nodes, autoscaler_limits())
    if reason:
        raise ContractError(f"cluster: {reason}. Ask for fewer workers or smaller ones.")
    return cpus, gpus
