"""`adaptfleet dev` as a user runs it, on the shipped manifests: each command a process of its own, and nothing left afterwards."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from adaptfleet.on_ray.cluster.processes import members, wait_gone
from adaptfleet.on_ray.cluster.record import read_record
from tests.kuberay.training import contract
from tests.serve.tiny_llama import make_base

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = "k8s/overlays/dev-cpu"
LIMIT_S = 400


def _adaptfleet(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from adaptfleet.cli import main; sys.exit(main())", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=LIMIT_S, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_up_submit_lose_down(fresh_home: Path, tmp_path: Path) -> None:
    base, data = make_base(tmp_path / "base"), tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}", "completion": "{i} it is"}}\n' for i in range(64)))
    train = {"max_steps": 3, "pack_tokens": 64, "packs_per_step": 2, "compile": "off"}
    sections = {"model": {"source": str(base), "dtype": "float32"}, "data": {"train": str(data), "test_fraction": 0.1}, "train": train}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(contract("dev", 10, **sections) | {"publish": {"name": "from-the-pool"}}))
    try:
        up = _adaptfleet("dev", "up", SHIPPED)
        assert "RayCluster train: ready" in up.stdout and "kept and not acted on" in up.stdout, up.stdout
        record = read_record(fresh_home / "local-cluster.json")
        assert record is not None
        inside = members(record.leader, record.marker)
        assert _adaptfleet("dev", "up", SHIPPED, check=False).returncode == 2, "a home has one cluster"

        _adaptfleet("submit", "jobs/finetune.py", "--config", str(tmp_path / "job.yaml"))
        assert "from-the-pool" in _adaptfleet("models", "list").stdout
        # the worker that came for it is idle now, and so still there
        pods = re.findall(r"train-cpu-worker-\w+", _adaptfleet("dev", "status").stdout)
        assert pods
        for pod in pods:
            assert "killed" in _adaptfleet("dev", "lose", pod).stdout
        end = time.monotonic() + 60
        while any(pod in _adaptfleet("dev", "status").stdout for pod in pods):
            assert time.monotonic() < end
        unknown = _adaptfleet("dev", "lose", "train-nothing", check=False)
        assert unknown.returncode == 2 and "train-" in unknown.stderr
    finally:
        down = _adaptfleet("dev", "down")
    assert "ended" in down.stdout and (fresh_home / "logs" / "dev" / "bed.log").is_file()
    assert not wait_gone(inside, 0) and not members(None, record.marker)
    assert not Path(record.folder).exists() and not (fresh_home / "local-cluster.json").exists()
    assert "nothing to end" in _adaptfleet("dev", "down").stdout


def test_what_is_wrong_is_said_before_anything_starts(fresh_home: Path, tmp_path: Path) -> None:
    pool = yaml.safe_load((REPOSITORY / "tests" / "kuberay" / "pool.yaml").read_text())
    pool["spec"]["autoscalerOptions"]["version"] = "v1"
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    for words, said in (
        (["up", str(tmp_path / "pool.yaml")], "v1"),
        (["up", str(tmp_path / "none.yaml")], "does not exist"),
        (["up", str(tmp_path / "pool.yaml"), "--fleet", "gpus"], "RESOURCE=AMOUNT"),
        (["apply", str(REPOSITORY / "tests" / "kuberay" / "service.yaml")], "dev up"),
        (["lose", "x"], "dev up"),
    ):
        refused = _adaptfleet("dev", *words, check=False)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert _adaptfleet("dev", "status", check=False).returncode == 1
    assert list(fresh_home.iterdir()) == []
