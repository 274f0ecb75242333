"""Where a step's computing happens: in a task of the cluster, on a GPU where it has one, or in this process where there is no cluster."""

import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.on_ray.joining import connected

P = ParamSpec("P")
R = TypeVar("R")


def placed(function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
    """The function's result. A submitted job's own process has no GPU and reserves no CPUs; ADAPTFLEET_HOME must be shared with the
    cluster's nodes."""
    if not os.environ.get("RAY_ADDRESS"):
        return function(*arguments, **keywords)
    # Ray reads its environment when it is imported.
    import ray

    with connected():
        num_gpus = int(ray.cluster_resources().get("GPU", 0) >= 1)
        num_cpus = max(1, int(ray.available_resources().get("CPU", 1)) if not num_gpus else 1)
        task: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_in_task)
        try:
            result: R = ray.get(task.remote(num_cpus, function, arguments, keywords))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AdaptfleetError):
                raise error.cause from None
            raise
    return result


def _in_task(num_cpus: int, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    import logging
    import sys

    import torch

    torch.set_num_threads(min(num_cpus, os.cpu_count() or 1))
    logging.basicConfig(level=os.environ.get("ADAPTFLEET_LOG", "INFO"), format="%(message)s", stream=sys.stdout)
    return function(*arguments, **keywords)
