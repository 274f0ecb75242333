"""`adaptfleet serve`, `submit` and `stop` as a user runs them: three processes, one cluster, and nothing of it afterwards."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from adaptfleet.on_ray.cluster.processes import members, wait_gone
from adaptfleet.on_ray.cluster.record import read_record
from tests.serve.tiny_llama import make_base

REPOSITORY = Path(__file__).resolve().parents[2]


def _adaptfleet(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from adaptfleet.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=800, check=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_serve_submit_stop(fresh_home: Path, tmp_path: Path) -> None:
    base, port = make_base(tmp_path / "base"), _free_port()
    words = ["serve", "--port", str(port), "--set", f"model.source={base}", "--set", "served_name=tiny"]
    words += ["--set", "model.dtype=float32", "--set", "max_model_len=256", "--set", "cpus_per_replica=1"]
    try:
        served = _adaptfleet(*words)
        assert served.returncode == 0, served.stderr
        key = (fresh_home / "client-key").read_text().strip()
        assert str(fresh_home / "api-keys") in served.stdout and key not in served.stdout + served.stderr
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert [model["id"] for model in json.load(reply)["data"]] == ["tiny"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60)

        record = read_record(fresh_home / "local-cluster.json")
        assert record is not None and record.owner is None
        inside = members(record.leader, record.marker)

        again = _adaptfleet(*words)
        assert again.returncode == 0, again.stderr
        elsewhere = _adaptfleet("serve", "--port", str(_free_port()))
        assert elsewhere.returncode == 2 and "adaptfleet stop" in elsewhere.stderr
        quickstart = _adaptfleet("quickstart")
        assert quickstart.returncode == 2 and "make stop" in quickstart.stderr

        # A contract that is wrong is told here; one that is right fails on the cluster, for want of its data, with the job's status.
        wrong = _adaptfleet("submit", "jobs/finetune.py", "--config", "jobs/configs/finetune_names.yaml", "--set", "train.epohcs=1")
        assert wrong.returncode == 2 and "epohcs" in wrong.stderr
        missing = [
            "--config",
            "jobs/configs/finetune_names.yaml",
            "--set",
            "data.train=no-such-file.jsonl",
            "--set",
            f"model.source={base}",
        ]
        failed = _adaptfleet("submit", "jobs/finetune.py", *missing)
        assert failed.returncode == 1 and "no-such-file.jsonl" in failed.stdout, failed.stdout + failed.stderr
        assert record.leader.is_alive()
    finally:
        stopped = _adaptfleet("stop")
    assert stopped.returncode == 0 and "stopped" in stopped.stdout, stopped.stderr
    assert not wait_gone(inside, 0)
    assert not (fresh_home / "local-cluster.json").exists() and not Path(record.folder).exists()
    assert (fresh_home / "logs" / "ray").is_dir()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)
    assert "nothing to stop" in _adaptfleet("stop").stdout


def test_serve_on_a_port_in_use_starts_nothing(fresh_home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = _adaptfleet("serve", "--port", str(taken.getsockname()[1]))
    assert refused.returncode == 2
    assert "Choose another with --port" in refused.stderr
    assert list(fresh_home.iterdir()) == []


def test_serve_with_a_misspelt_key_starts_nothing(fresh_home: Path) -> None:
    refused = _adaptfleet("serve", "--set", "max_lora=3")
    assert refused.returncode == 2
    assert "max_loras" in refused.stderr
    assert list(fresh_home.iterdir()) == []


def test_submit_without_a_cluster_says_where_to_get_one(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    refused = _adaptfleet("submit", "jobs/finetune.py", "--config", "jobs/configs/finetune_names.yaml")
    assert refused.returncode == 2
    assert "make serve" in refused.stderr
