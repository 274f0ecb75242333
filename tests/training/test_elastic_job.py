"""A run whose nodes are preempted, join and die, on a real cluster: the losses are those of a run that nothing happened to."""

import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_finetune_job import LIMIT_S, REPOSITORY, Job, command, run, run_folder, wait_for_step, write
from tests.training.test_finetune_job import contract as contract  # a fixture
from tests.training.worker_node import SLOW, WorkerNode

pytestmark = pytest.mark.slow
EVERY_STEPS = 20


def lines(job: Job, kind: str) -> list[dict[str, float]]:
    parsed = map(json.loads, (run_folder(job) / "metrics.jsonl").read_text().splitlines())
    return [line for line in parsed if line["kind"] == kind]


def wait_for_workers(job: Job, count: int, process: "subprocess.Popen[str]") -> int:
    """Waits until a step was made by so many workers; returns it."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if (run_folder(job) / "metrics.jsonl").exists() and (made := lines(job, "train")) and made[-1]["num_workers"] == count:
            return int(made[-1]["step"])
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.2)
    raise AssertionError(f"no step of {count} workers in {LIMIT_S} s")


def known_checkpoint(job: Job) -> int:
    """The step of the last checkpoint that Ray Train will resume from. A checkpoint is written beside the training, so that it counts some
    steps after the one that it holds: one second of it is many steps of so small a model."""
    snapshot = run_folder(job) / "checkpoint_manager_snapshot.json"
    latest = json.loads(snapshot.read_text())["latest_checkpoint_result"] if snapshot.exists() else None
    return int(latest["metrics"]["step"]) if latest else 0


def wait_for_checkpoint(job: Job, step: int, process: "subprocess.Popen[str]") -> int:
    """Waits until the run would go on from this step or a later one; returns which."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if (known := known_checkpoint(job)) >= step:
            return known
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step} in {LIMIT_S} s")


def test_nodes_come_and_go(small_cluster: Any, contract: Callable[..., Job], tmp_path: Path) -> None:
    slow_disk, slow_steps = (Path(os.environ["ADAPTFLEET_HOME"]) / name for name in ("slow-disk", "slow-steps"))
    sections: dict[str, dict[str, Any]] = {
        "train": {"epochs": 1000, "max_steps": 500, "pack_tokens": 512, "packs_per_step": 4, "learning_rate": 0.001},
        "evaluation": {"max_generated_rows": 0, "max_sample_rows": 0},
        "checkpoint": {"every_steps": EVERY_STEPS},
    }
    still = contract("still", **sections)
    result = run(still, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    sections["cluster"] = {"workers": {"min": 1, "max": 2}, "resize_check_interval_s": 2.0, "max_failures": 2}
    job = contract("elastic", **sections)
    first = WorkerNode(small_cluster, 1, tmp_path / "first.log", SLOW)
    second: WorkerNode | None = None
    slow_steps.touch()  # or a quick machine is done before a node has joined
    try:
        with subprocess.Popen(
            command(write(job, tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
        ) as process:
            try:
                wait_for_workers(job, 2, process)
                wait_for_step(job, 30, process)
                # the worker that writes no checkpoint is ready to leave long before the one that does
                slow_disk.touch()
                first.drain(seconds=60)
                wait_for_workers(job, 1, process)
                slow_disk.unlink()
                first.kill()
                known_at_join = known_checkpoint(job)
                second = WorkerNode(small_cluster, 1, tmp_path / "second.log", SLOW)
                grown = wait_for_workers(job, 2, process)
                known_at_kill = wait_for_checkpoint(job, grown + EVERY_STEPS, process)
                second.kill()
                wait_for_workers(job, 1, process)
                slow_steps.unlink()
                output, _ = process.communicate(timeout=LIMIT_S)
            finally:
                process.kill()
        assert process.returncode == 0, output[-3000:]
    finally:
        slow_steps.unlink(missing_ok=True)
        slow_disk.unlink(missing_ok=True)
        for node in (first, second):
            if node is not None:
                node.kill()
    starts = lines(job, "start")
    # a busy machine may begin with one worker and grow at once
    assert [start["num_workers"] for start in starts][-4:] == [2, 1, 2, 1]
    preempted, joined, killed = starts[-3:]
    assert preempted["redone"] == 0
    assert joined["step"] >= known_at_join and killed["step"] >= known_at_kill
    made, expected = lines(job, "train"), lines(still, "train")
    assert [line["step"] for line in made] == list(range(1, 501))
    # gradients are summed in another order, and AdamW divides by their size, so the difference grows with each step and with the time that
    # two workers shared; a step on other samples would differ by several percent, as neighbouring steps do
    differences = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(made, expected, strict=True)]
    neighbours = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in itertools.pairwise(expected)]
    assert max(differences[:30]) < 1e-4
    assert statistics.mean(differences) < statistics.median(neighbours)
