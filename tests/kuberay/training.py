"""An elastic fine-tune on a pool, followed by what its log says."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from adaptfleet.on_ray.kuberay.client import KubeClient
from adaptfleet.on_ray.kuberay.objects import has_condition, name_of


def contract(run: str, every_steps: int, **sections: Any) -> dict[str, Any]:
    """One or two workers of one core, on the embedded model unless `model` says another."""
    return {
        "job": "finetune", "run": run, "data": {"train": "address-json"},
        "train": {"epochs": 50, "pack_tokens": 256, "packs_per_step": 2, "learning_rate": 1e-4, "compile": "off"},
        "evaluation": {"max_generated_rows": 0, "max_sample_rows": 0, "max_loss_rows": 4}, "checkpoint": {"every_steps": every_steps},
        "cluster": {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 1, "resize_check_interval_s": 2.0, "max_failures": 5},
        "publish": None, **sections,
    }  # fmt: skip


def ray_job(name: str, job: dict[str, Any], folder: Path, cluster: str, **spec: Any) -> dict[str, Any]:
    """A RayJob of that contract on a RayCluster that is there."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job))
    entrypoint = f"python jobs/finetune.py --config {file}"
    kind = {"entrypoint": entrypoint, "submissionMode": "HTTPMode", "clusterSelector": {"ray.io/cluster": cluster}}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": {**kind, **spec}}


class Run:
    """The steps of a run, as its folder has them."""

    def __init__(self, home: Path, name: str, is_over: Callable[[], bool], limit_s: float) -> None:
        self.folder = home / "runs" / name
        self._is_over = is_over
        self._limit_s = limit_s

    def lines(self, kind: str) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        # the last line may be half written
        return [line for line in map(json.loads, text[: text.rfind("\n") + 1].splitlines()) if line["kind"] == kind]

    def wait(self, until: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The newest step for which it holds."""
        end = time.monotonic() + self._limit_s
        while time.monotonic() < end:
            made = self.lines("train")
            if made and until(made[-1]):
                return made[-1]
            if self._is_over():
                raise AssertionError(f"the job ended before {what}; see {self.folder}")
            time.sleep(0.1)
        raise AssertionError(f"{what} did not come within {self._limit_s} s; see {self.folder}")

    def steps_of(self, workers: int, after: float = 0.0, more: int = 1) -> dict[str, Any]:
        """The first step so many workers made after a time, once `more` of them are made."""
        self.wait(lambda line: line["at"] > after and line["num_workers"] == workers, f"a step of {workers} workers")
        found = next(line for line in self.lines("train") if line["at"] > after and line["num_workers"] == workers)
        self.wait(lambda line: line["step"] >= found["step"] + more - 1, f"{more} steps of {workers} workers")
        return found

    def redone_after(self, at: float) -> int:
        """Steps made again at the first start after a time."""
        return int(next(line["redone"] for line in self.lines("start") if line["at"] > at))


def ready_pods(kube: KubeClient, cluster: str, group: str) -> list[str]:
    """Names of the group's pods that run."""
    return [name_of(pod) for pod in kube.pods(cluster, group) if (pod.get("status") or {}).get("phase") == "Running"]


def head_is_ready(kube: KubeClient, cluster: str, other_than: str = "") -> str | None:
    """The head pod's name, once it answers."""
    heads = [pod for pod in kube.pods(cluster, "headgroup") if has_condition(pod, "Ready") and name_of(pod) != other_than]
    return name_of(heads[0]) if heads else None
