"""Where a trial's computing happens: in tasks of the cluster, whose processes stay warm from one trial to the next. A trial itself only
waits for them, and holds no CPU while it does."""

import ctypes
import gc
import importlib
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.contracts.home import home
from adaptfleet.on_ray.tune.sweep_folder import Cost


@dataclass(frozen=True)
class Place:
    """What every task of a sweep is told."""

    home: str
    store: str | None
    address: str
    num_cpus: int
    """Of a step."""
    all_cpus: int
    """Of a node, less what other work held when the sweep began: what a measurement takes to be alone."""

    @classmethod
    def here(cls, at_a_time: int = 1) -> "Place":
        """Where this process is connected to; asked for before the sweep's own work begins."""
        largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        free = max(1, int(min(largest, ray.available_resources().get("CPU", 1))))
        address = ray.get_runtime_context().gcs_address
        return cls(str(home()), os.environ.get("ADAPTFLEET_STORE"), address, max(1, free // at_a_time), free)

    def enter(self) -> None:
        """Tasks may run in processes that were started with another environment."""
        os.environ["ADAPTFLEET_HOME"] = self.home
        if self.store:
            os.environ["ADAPTFLEET_STORE"] = self.store
        # a training inside of the task finds the cluster by it
        os.environ["RAY_ADDRESS"] = self.address


def compute(place: Place, function: str, *arguments: Any, alone: bool = False) -> tuple[Any, Cost]:
    """The result of `module.function` of this package, from a task, and what it cost: a trial need not import what only tasks need.
    `alone`: with every free CPU of a node, or a GPU where there is one."""
    ref = submit(place, function, *arguments, alone=alone)
    return finished(ref)


def submit(place: Place, function: str, *arguments: Any, alone: bool = False, waits: bool = False) -> Any:
    """A reference to the task. `waits`: it only waits for others that compute, and takes no CPU."""
    num_gpus = 0.0 if waits else float(ray.cluster_resources().get("GPU", 0) >= 1)
    num_cpus = 0 if waits else place.all_cpus if alone else place.num_cpus
    # a trial's placement group holds the trial alone, and would else be asked for its tasks too
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
    task: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1, scheduling_strategy=outside)(_in_task)
    return task.remote(place, max(1, num_cpus), function, arguments)


def finished(ref: Any) -> tuple[Any, Cost]:
    try:
        result: tuple[Any, Cost] = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AdaptfleetError):
            raise error.cause from None
        raise
    return result


def _in_task(place: Place, num_cpus: int, function: str, arguments: tuple[Any, ...]) -> tuple[Any, Cost]:
    import torch

    place.enter()
    torch.set_num_threads(min(num_cpus, os.cpu_count() or 1))
    began, cpu = time.perf_counter(), _cpu_s()
    module, _, name = function.partition(".")
    try:
        result = getattr(importlib.import_module(f"adaptfleet.on_ray.tune.{module}"), name)(*arguments)
    finally:
        _give_back_memory()
    return result, Cost(_cpu_s() - cpu, time.perf_counter() - began)


def _give_back_memory() -> None:
    """A process that stays warm for the next step would else keep, freed but not returned, what its largest steps took: gigabytes of it
    after a dozen models."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _cpu_s() -> float:
    """Of this process and of its children that have ended."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
