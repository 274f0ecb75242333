"""A job whose data are a mixture tokenised on the cluster, and the next job with the same data."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.loading import parse_contract

REPOSITORY = Path(__file__).resolve().parents[2]


def write_products(folder: Path) -> Path:
    """Shards of prompt and completion, beside chat rows."""
    folder.mkdir()
    for shard in range(3):
        rows = [{"prompt": f"{a}*{shard}", "completion": json.dumps({"product": a * shard})} for a in range(12)]
        (folder / f"part-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(job: dict[str, Any], folder: Path) -> str:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    command = [sys.executable, str(REPOSITORY / "jobs" / "finetune.py"), "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_folder(job: dict[str, Any]) -> Path:
    return Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / parse_contract(FinetuneJob, yaml.safe_dump(job)).run_name()


def losses(job: dict[str, Any]) -> list[float]:
    lines = map(json.loads, (run_folder(job) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_mixture_is_tokenised_on_the_cluster_and_once(local_cluster: Any, tiny_base: Path, sums_file: Path, tmp_path: Path) -> None:
    mixture = [{"source": str(sums_file), "weight": 1.0}, {"source": str(write_products(tmp_path / "products")), "weight": 2.0}]
    job: dict[str, Any] = {
        "model": {"source": str(tiny_base), "dtype": "float32"},
        "data": {"mixture": mixture, "preprocess": "ray"},
        "method": {"rank": 4},
        # a length of its own: other jobs of the tests leave tokens of the same rows in the cache
        "train": {"epochs": 3, "max_steps": 6, "pack_tokens": 72, "packs_per_step": 2, "compile": "off"},
        "evaluation": {"max_generated_rows": 2, "max_new_tokens": 4},
        "cluster": {"workers": 1, "cpus_per_worker": 1},
        "publish": {"name": "mixed"},
    }
    first = run(job, tmp_path)
    assert first.count("tokenising") == 2 and "144 rows became" in first and "36 rows became" in first
    again = job | {"publish": {"name": "mixed-again"}}
    second = run(again, tmp_path)
    assert "tokenising" not in second and "the tokens of 144 rows are in the cache" in second
    assert len(losses(job)) == 6 and losses(job) == losses(again)
    facts = json.loads((run_folder(job) / "facts.json").read_text())
    assert facts["num_train_rows"] + facts["num_test_rows"] == 180
    # The run holds its tokens even if the cache is cleared.
    rows = run_folder(job) / "rows"
    assert all((rows / name).stat().st_nlink == 3 for name in json.loads((rows / "files.json").read_text()))
