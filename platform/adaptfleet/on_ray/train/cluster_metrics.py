"""A run's state as metrics of the Ray cluster, which Prometheus scrapes from its nodes: what alerts on training look at.

Exported with Ray's prefix: `ray_adaptfleet_training_loss` and so on, by `run`.
"""

import time
from pathlib import Path

_GAUGES = {
    "running": "1 while the run trains, 0 once it ended in order.",
    "step": "Optimizer steps made.",
    "loss": "Training loss of the last step.",
    "tokens_per_second": "Tokens trained a second, over all workers, since the run began or resumed.",
    "workers": "Workers that train together.",
    "stepped_at_seconds": "When the last step was made, in seconds since 1970.",
    "checkpointed_at_seconds": "When the newest checkpoint was written, in seconds since 1970; of a run without one, when it began.",
}
_VALUES = {"loss": "loss", "tokens_per_s": "tokens_per_second", "num_workers": "workers"}
_LOOK_AGAIN_S = 10.0


class ClusterMetrics:
    """A tracker: it gets each step's numbers. Of a run that moved to another process, the newest time counts (`max by (run)`)."""

    def __init__(self, run: str, checkpoints: Path) -> None:
        # Ray reads its environment when it is imported, and a program that starts a cluster of its own sets it after importing this
        from ray.util.metrics import Gauge

        self._gauges = {name: Gauge(f"adaptfleet_training_{name}", text, tag_keys=("run",)) for name, text in _GAUGES.items()}
        self._tags = {"run": run}
        self._checkpoints = checkpoints
        self._looked_at = float("-inf")
        self._set("running", 1)
        self._set("checkpointed_at_seconds", _newest(checkpoints) or time.time())

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if kind != "train":
            return
        self._set("step", step)
        self._set("stepped_at_seconds", time.time())
        for key, name in _VALUES.items():
            if key in values:
                self._set(name, values[key])
        if time.monotonic() - self._looked_at > _LOOK_AGAIN_S:
            self._looked_at = time.monotonic()
            newest = _newest(self._checkpoints)
            if newest:
                self._set("checkpointed_at_seconds", newest)

    def close(self) -> None:
        self._set("running", 0)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, tags=self._tags)


def _newest(folder: Path) -> float | None:
    """When the newest checkpoint in the run's folder was written."""
    times = []
    for place in folder.glob("checkpoint_*"):
        try:
            times.append(place.stat().st_mtime)
        except FileNotFoundError:
            continue  # an older one, being removed
    return max(times, default=None)
