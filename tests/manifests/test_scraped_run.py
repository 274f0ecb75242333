"""A real Prometheus with the shipped rules scrapes a real run on Ray: what alerts look at is exported under the names that they use."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.validation.manifests import ROOT

RULES = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
LIMIT_S = 120
STEPS = 6


class Prometheus:
    """On a free loopback port, with everything in a folder."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{chosen.getsockname()[1]}"
        (folder / "rules.yaml").write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"], width=1000))
        scrape = {"job_name": "ray", "scrape_interval": "1s", "static_configs": [{"targets": targets}]}
        config = {"global": {"evaluation_interval": "1s"}, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = ["prometheus", "--config.file=prometheus.yaml", f"--web.listen-address={self.address}", "--storage.tsdb.path=data"]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)

    def query(self, expression: str) -> list[dict[str, Any]]:
        url = f"http://{self.address}/api/v1/query?query={urllib.parse.quote(expression)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result

    def awaited(self, expression: str) -> list[dict[str, Any]]:
        end = time.monotonic() + LIMIT_S
        while True:
            try:
                found = self.query(expression)
            except OSError:
                found = []
            if found or time.monotonic() > end:
                return found
            time.sleep(0.5)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


@pytest.fixture
def prometheus(local_cluster: Any, tmp_path: Path) -> Iterator[Prometheus]:
    [discovery] = [file for file in local_cluster.folder.rglob("prom_metrics_service_discovery.json") if "session_latest" not in file.parts]
    targets = [target for entry in json.loads(discovery.read_text()) for target in entry["targets"]]
    server = Prometheus(tmp_path, targets)
    yield server
    server.stop()


if shutil.which("prometheus") or os.environ.get("CI") == "true":

    @pytest.mark.slow
    def test_a_run_shows_in_prometheus_and_alarms_nobody(local_cluster: Any, prometheus: Prometheus) -> None:
        assert prometheus.awaited("ray_node_mem_used")
        job = ["python", "jobs/finetune.py", "--config", "jobs/configs/finetune_names.yaml"]
        for override in (
            "run=scraped-run",
            f"train.max_steps={STEPS}",
            "train.compile=off",
            "checkpoint.every_steps=2",
            "evaluation.max_loss_rows=2",
            "evaluation.max_generated_rows=0",
            "evaluation.max_sample_rows=0",
            "data.max_rows=40",
            "publish=null",
        ):
            job += ["--set", override]
        local_cluster.submit(job, ROOT)
        # Nodes and accelerators, by the names that rules and panels use.
        for name in ("ray_node_mem_total", "ray_node_disk_utilization_percentage", "ray_resources"):
            assert prometheus.awaited(name), name
        # The run, as far as it went when a node last told: nodes do so every few seconds.
        run = '{run="scraped-run"}'
        assert prometheus.awaited(f"max_over_time(ray_adaptfleet_training_running{run}[10m])")
        for name in ("step", "loss", "tokens_per_second", "workers", "stepped_at_seconds", "checkpointed_at_seconds"):
            assert prometheus.awaited(f"max_over_time(ray_adaptfleet_training_{name}{run}[10m])"), name
        # An ended run must not count as running: it would be taken for a stalled one a quarter of an hour later.
        assert prometheus.awaited(f"absent(ray_adaptfleet_training_running{run} == 1)")
        assert prometheus.query('ALERTS{alertstate="firing"}') == []
