"""How often workers may fail. Ray Train counts a worker that leaves a preempted node as a failure; here only real ones count."""

from pathlib import Path
from typing import Any, NoReturn

import ray.train
from ray.train import CheckpointConsistencyMode, UserCallback

from adaptfleet.on_ray.train.run_folder import RunFolder


class PreemptedError(Exception):
    """Ends a worker at a preemption notice, its state saved: Ray Train starts the run again on the nodes that stay."""


def leave(step: int, patience_s: float = 60.0) -> NoReturn:
    """Raises PreemptedError once the controller knows of what every worker has reported.

    It restarts the run as soon as it sees an error, and asks nobody for reports that are still on their way: a worker without a checkpoint
    of its own that left at once would cost the steps since the one before.
    """
    ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, patience_s)
    raise PreemptedError(f"preempted after step {step}; nothing is lost")


class FailureCount(UserCallback):
    """Counts in the controller. Above the limit it writes `failure.json`, at which the next workers end and the job tells why."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._count = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        reasons = [f"{type(error).__name__}: {error}" for error in worker_exceptions.values()]
        real = [reason for reason in reasons if PreemptedError.__name__ not in reason]
        if not real:
            return
        self._count += 1
        if self._count > self._limit:
            lines = [line for line in real[0].strip().splitlines() if line.strip()]
            message = (
                f"workers failed {self._count} times, more than cluster.max_failures ({self._limit}) allows. The last reason: {lines[-1]}. "
                f"The last checkpoint is kept: mend the cause and submit the same contract again to go on from it."
            )
            RunFolder(self._folder).write_json("failure.json", {"kind": "TrainingError", "message": message})
