"""The part of a fine-tune that runs on the cluster."""

from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import ClusterSpec, FinetuneJob
from adaptfleet.on_ray.train.progress import ProgressTeller
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.train.worker import train_worker


def fit(job: FinetuneJob, folder: RunFolder) -> None:
    """Trains on Ray's workers. A run of the same name goes on from its last checkpoint."""
    with ray.init(ignore_reinit_error=True):
        cpus, gpus = worker_resources(job.cluster)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job.model_dump_json(), "folder": str(folder.path), "num_cpus": cpus},
            scaling_config=ScalingConfig(
                num_workers=job.cluster.workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {})
            ),
            run_config=RunConfig(
                name=job.run_name(),
                storage_path=str(folder.path.parent),
                failure_config=FailureConfig(max_failures=job.cluster.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=job.checkpoint.keep),
            ),
        )
        with ProgressTeller(folder):
            trainer.fit()


def worker_resources(cluster: ClusterSpec) -> tuple[int, float]:
    """CPUs and GPUs of one worker: what the contract says, else an equal share of what is free now. ContractError when it can't fit."""
    total, free = ray.cluster_resources(), ray.available_resources()
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(total.get("GPU", 0) >= cluster.workers)
    cpus = cluster.cpus_per_worker or max(1, int(free.get("CPU", 0)) // cluster.workers)
    wanted: dict[str, Any] = {"CPU": cpus * cluster.workers, "GPU": gpus * cluster.workers}
    short = [
        f"{value:g} {name}s where the cluster has {total.get(name, 0):g}" for name, value in wanted.items() if value > total.get(name, 0)
    ]
    if short:
        raise ContractError(f"cluster: {cluster.workers} workers want {' and '.join(short)}. Ask for fewer workers or smaller ones.")
    return cpus, gpus
