"""What faults cost a run of the embedded model on a real local cluster of two nodes, one thread a worker.

    python bench/elastic.py

One run meets them in turn: a worker is killed, a node is preempted, a node joins, a node is killed.

kill_recovery_s        from kill -9 of a worker to the first step after it, with the steps made again
preempt_steps_redone   steps made again after a preemption notice
resize_gap_s           from the last step of the smaller group to the first of the larger, after a node joined
node_loss_s            from kill -9 of a node to the first step without it

Results: bench/results/elastic.json.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]
RESULTS = REPOSITORY / "bench" / "results" / "elastic.json"
EVERY_STEPS = 10
LIMIT_S = 300


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == kind] if file.exists() else []


class Run:
    """The job as a process, and what its log says."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.folder = folder
        self.process = process

    def wait(self, until: Any, what: str) -> dict[str, Any]:
        """The newest step for which `until` holds."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            made = lines(self.folder, "train")
            if made and until(made[-1]):
                return made[-1]
            if self.process.poll() is not None:
                sys.exit(f"the job ended before {what}:\n{(self.folder.parents[1] / 'job.log').read_text()[-3000:]}")
            time.sleep(0.1)
        sys.exit(f"{what} did not come within {LIMIT_S} s:\n{(self.folder.parents[1] / 'job.log').read_text()[-3000:]}")

    def step_later(self, steps: int) -> dict[str, Any]:
        now = lines(self.folder, "train")[-1]["step"]
        return self.wait(lambda line: line["step"] >= now + steps, f"step {now + steps}")

    def first_after(self, at: float, workers: int) -> dict[str, Any]:
        self.wait(lambda line: line["at"] > at and line["num_workers"] == workers, f"a step of {workers} workers")
        return next(line for line in lines(self.folder, "train") if line["at"] > at and line["num_workers"] == workers)

    def redone(self) -> int:
        return int(lines(self.folder, "start")[-1]["redone"])


def measure(cluster: Any, home: Path) -> dict[str, Any]:
    from tests.training.worker_node import WorkerNode

    contract = {
        "job": "finetune", "run": "elastic", "data": {"train": "address-json"},
        "train": {"epochs": 4, "pack_tokens": 256, "packs_per_step": 2, "learning_rate": 1e-4, "compile": "off"},
        "evaluation": {"max_generated_rows": 0, "max_sample_rows": 0}, "checkpoint": {"every_steps": EVERY_STEPS},
        "cluster": {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 1, "resize_check_interval_s": 2.0, "max_failures": 5},
        "publish": None,
    }  # fmt: skip
    file = home / "elastic.yaml"
    file.write_text(yaml.safe_dump(contract))
    at_home = {"ADAPTFLEET_HOME": str(home)}
    first = WorkerNode(cluster, 1, home / "first.log", at_home)
    second = None
    command = [sys.executable, str(REPOSITORY / "jobs" / "finetune.py"), "--config", str(file)]
    environment = {**os.environ, **cluster.env, "ADAPTFLEET_HOME": str(home)}
    with (home / "job.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    run = Run(home / "runs" / "elastic", process)
    found: dict[str, Any] = {"checkpoint_every_steps": EVERY_STEPS}
    try:
        run.wait(lambda line: line["num_workers"] == 2 and line["step"] >= 15, "the first steps of two workers")
        print("killing a worker ...", flush=True)
        killed_at = time.time()
        os.kill(json.loads((run.folder / "progress.json").read_text())["pid"], signal.SIGKILL)
        found["kill_recovery_s"] = round(run.first_after(killed_at, 2)["at"] - killed_at, 1)
        found["kill_steps_redone"] = run.redone()
        run.step_later(7)
        print("preempting a node ...", flush=True)
        noticed_at = time.time()
        first.drain(seconds=60)
        found["preempt_gap_s"] = round(run.first_after(noticed_at, 1)["at"] - noticed_at, 1)
        found["preempt_steps_redone"] = run.redone()
        first.kill()
        run.step_later(3)
        print("a node joins ...", flush=True)
        second = WorkerNode(cluster, 1, home / "second.log", at_home)
        joined_at = time.time()
        grown = run.first_after(joined_at, 2)
        start = lines(run.folder, "start")[-1]
        found["join_to_first_step_s"] = round(grown["at"] - joined_at, 1)
        found["resize_gap_s"] = round(grown["at"] - start["stopped_at"], 1)
        found["resize_steps_redone"] = run.redone()
        run.step_later(7)
        print("killing a node ...", flush=True)
        lost_at = time.time()
        second.kill()
        found["node_loss_s"] = round(run.first_after(lost_at, 1)["at"] - lost_at, 1)
        found["node_loss_steps_redone"] = run.redone()
    finally:
        process.terminate()
        process.wait(timeout=60)
        for node in (first, second):
            if node is not None:
                node.kill()
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from adaptfleet.contracts.home import home
    from adaptfleet.core.data.embedded import embedded_dataset
    from adaptfleet.core.models.embedded import embedded_model
    from adaptfleet.on_ray.local_cluster import LocalCluster

    embedded_model("smollm2-135m"), embedded_dataset("address-json")
    with tempfile.TemporaryDirectory(prefix="bench-elastic-") as folder:
        place = Path(folder)
        for kept in ("models", "cache"):
            (place / kept).symlink_to(home() / kept)
        with LocalCluster.start(num_cpus=1, env={"ADAPTFLEET_HOME": folder}) as cluster:
            found = measure(cluster, place)
    for key, value in found.items():
        print(f"{key} {value}")
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    others = {key: earlier[key] for key in ("pools", "fleet", "capacity") if key in earlier}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
    RESULTS.write_text(json.dumps({"machine": machine, **found, **others}, indent=1) + "\n")
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
