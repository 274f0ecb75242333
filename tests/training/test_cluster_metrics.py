"""A run's state as gauges: the newest checkpoint counts, and nothing but steps moves them."""

import os
from pathlib import Path

from adaptfleet.on_ray.train.cluster_metrics import ClusterMetrics


class Kept(ClusterMetrics):
    """Keeps what is set, beside Ray's own gauges, which need a cluster to be read."""

    def __init__(self, run: str, checkpoints: Path) -> None:
        self.values: dict[str, float] = {}
        super().__init__(run, checkpoints)

    def _set(self, name: str, value: float) -> None:
        super()._set(name, value)
        self.values[name] = value


def test_gauges_follow_the_run(tmp_path: Path) -> None:
    for name, written_at in (("checkpoint_000001", 1_000), ("checkpoint_000002", 3_000), ("checkpoint_000003", 2_000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (written_at, written_at))
    metrics = Kept("run", tmp_path)
    assert metrics.values == {"running": 1, "checkpointed_at_seconds": 3_000}
    metrics.write("evaluation", 4, {"eval_loss": 1.0})
    assert "step" not in metrics.values
    metrics.write("train", 5, {"loss": 1.5, "tokens_per_s": 300.0, "num_workers": 2, "grad_norm": 1.0})
    assert {name: metrics.values[name] for name in ("step", "loss", "tokens_per_second", "workers")} == {
        "step": 5,
        "loss": 1.5,
        "tokens_per_second": 300.0,
        "workers": 2,
    }
    assert metrics.values["stepped_at_seconds"] > 1_000_000
    metrics.close()
    assert metrics.values["running"] == 0


def test_a_run_without_a_checkpoint_counts_from_its_beginning(tmp_path: Path) -> None:
    assert Kept("run", tmp_path).values["checkpointed_at_seconds"] > 1_000_000
