"""`jobs/evaluate.py` as a job of a real cluster: models are scored in a task of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]


def submit(cluster: Any, tmp_path: Path, **values: Any) -> tuple[int, list[str]]:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(values))
    lines: list[str] = []
    return cluster.submit(["python", "jobs/evaluate.py", "--config", str(file)], REPOSITORY, show=lines.append, check=False), lines


@pytest.fixture
def contract(tiny_base: Path, sums_file: Path) -> dict[str, Any]:
    return {
        "model": {"source": str(tiny_base), "dtype": "float32"},
        "rows": str(sums_file),
        "max_rows": 4,
        "max_new_tokens": 4,
        "num_resamples": 100,
    }


def test_a_submitted_evaluation(
    local_cluster: Any, embedded_home: Path, contract: dict[str, Any], tiny_adapter: Path, tmp_path: Path
) -> None:
    status, lines = submit(local_cluster, tmp_path, subjects=["base", str(tiny_adapter)], **contract)
    shown = "\n".join(lines)
    assert status == 0, shown[-3000:]
    assert "less base, on the same rows" in shown, shown[-3000:]
    (folder,) = (embedded_home / "runs").glob("evaluation-*")
    found = json.loads((folder / "results.json").read_text())["metrics"]
    assert found["base"]["perplexity"]["value"] != found[str(tiny_adapter)]["perplexity"]["value"]


def test_what_a_task_refuses_is_told_as_it_is_here(
    local_cluster: Any, contract: dict[str, Any], tiny_adapter: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "adapter_config.json").write_text((tiny_adapter / "adapter_config.json").read_text())
    (odd / "adapter_model.safetensors").write_bytes(b"no tensors")
    status, lines = submit(local_cluster, tmp_path, subjects=[str(odd)], **contract)
    shown = "\n".join(lines)
    assert status != 0 and "error: the adapter in" in shown and "does not fit" in shown, shown[-3000:]
