"""`jobs/sweep.py` as a user runs it, on a real cluster with a small model: to a promoted point, through kill -9 and failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.loading import load_contract
from adaptfleet.contracts.search import SweepJob
from adaptfleet.contracts.search_points import job_of
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder
from adaptfleet.store.registry import Registry
from tests.conftest import TEST_HOME

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 600
AXES: dict[str, Any] = {
    "rank": {"path": "steps.recover.method.rank", "values": [None, 4], "without": ["steps.recover", "steps.merge"]},
    "ratio": {"path": "steps.prune.mlp_width", "values": [0.0, 0.4]},
    "bits": {"path": "steps.quantize.scheme", "choices": {"16": None, "8": {"kind": "w8a8"}}, "without": ["steps.quantize"]},
}


def contract(folder: Path, base: Path, rows: Path, name: str, axes: list[str], **keys: Any) -> tuple[Path, SweepJob]:
    recover = {
        "kind": "recover",
        "method": {"kind": "lora", "rank": 8},
        "train": {"epochs": 8, "max_steps": 24, "pack_tokens": 64, "packs_per_step": 2, "learning_rate": 0.01, "compile": "off"},
        "cluster": {"cpus_per_worker": 1},
    }
    steps: list[Any] = [
        {"kind": "prune"},
        *([recover, "merge"] if "rank" in axes else []),
        *([{"kind": "quantize"}] if "bits" in axes else []),
    ]
    space = {
        "job": "compress",
        "base": {
            "model": {"source": str(base)},
            "calibration": {"data": {"train": str(rows)}, "num_rows": 32},
            "steps": steps,
            "proof": {"max_rows": 8, "num_resamples": 200, "rounds": 1, "engine": "rank" in axes},
        },
        "axes": {axis: AXES[axis] for axis in axes},
        "baseline": {axis: {"rank": None, "ratio": 0.0, "bits": "16"}[axis] for axis in axes},
        "objectives": [{"metric": "nll"}, {"metric": "bytes"}],
        "early_stopping": {"kind": "dominance", "evaluations": 2},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"job": "sweep", "name": name, "space": space, **keys}, sort_keys=False))
    return file, load_contract(SweepJob, file)


def started(file: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "jobs" / "sweep.py"), "--config", str(file)]
    log = file.with_suffix(".log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env={**os.environ, **environment})


def said(file: Path) -> str:
    return file.with_suffix(".log").read_text()


def finished(folder: SweepFolder) -> dict[str, int]:
    return {
        name: (folder.path / "trials" / f"{name}.json").stat().st_mtime_ns for name, record in folder.records().items() if record.metrics
    }


def promote(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from adaptfleet.cli import main; sys.exit(main())", "promote", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)


@pytest.mark.usefixtures("local_cluster")
def test_a_search_without_training_to_a_promoted_point(embedded_home: Path, small_base: Path, sums: Path, tmp_path: Path) -> None:
    finalists = {"max": 4, "name": "narrow-sweep"}
    file, sweep = contract(tmp_path, small_base, sums, "widths", ["ratio"], finalists=finalists)
    process = started(file)
    assert process.wait(timeout=LIMIT_S) == 0, said(file)[-3000:]
    folder = SweepFolder(embedded_home / "runs" / sweep.run_name())
    records = folder.records()
    assert {name: record.status for name, record in records.items()} == {"ratio0": "finished", "ratio0.4": "finished"}
    assert records["ratio0.4"].metrics["bytes"] < records["ratio0"].metrics["bytes"]
    front = json.loads((folder.path / "front.json").read_text())
    published = {point["point"]: point["published"] for point in front["front"]}
    assert published["ratio0.4"] == "narrow-sweep@1", "the smallest is on the front, whatever it lost"
    assert published.get("ratio0") is None, "the parent itself needs no copy"
    manifest = Registry.open().resolve("narrow-sweep@1")
    assert manifest.method and (manifest.method["sweep"], manifest.method["point"]) == ("widths", "ratio0.4")
    assert manifest.parents[0].startswith("base:small-llama:") and manifest.metrics["perplexity_in_domain_low"] > 0
    page = (folder.path / "report.html").read_text()
    assert "ratio0.4" in page and "narrow-sweep@1" in page and "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")

    before = finished(folder)
    process = started(file)
    assert process.wait(timeout=LIMIT_S) == 0, said(file)[-3000:]
    assert finished(folder) == before, "nothing is made again"
    assert Registry.open().versions("narrow-sweep") == [1]

    assert Registry.open().aliases("narrow-sweep") == {}
    done = promote("sweep/widths#ratio0.4")
    assert done.returncode == 0 and done.stdout.strip() == "narrow-sweep@prod -> narrow-sweep@1", done.stderr
    for words, message in (
        (["sweep/widths#ratio0.5"], "has published no point 'ratio0.5'. Did you mean 'ratio0.4'?"),
        (["sweep/widhts#ratio0.4"], "no point of the sweep 'widhts' is published. Did you mean 'widths'?"),
        (["sweep/widths"], "names no point. Write sweep/NAME#POINT"),
    ):
        refused = promote(*words)
        assert refused.returncode == 2 and message in refused.stderr


@pytest.mark.slow
def test_the_joint_search_through_kill_9(embedded_home: Path, small_base: Path, sums: Path, tmp_path: Path) -> None:
    file, sweep = contract(tmp_path, small_base, sums, "joint-small", ["rank", "ratio"], finalists={"max": 2})
    folder = SweepFolder(embedded_home / "runs" / sweep.run_name())
    # a cluster of its own, which ends with the driver
    process = started(file, RAY_ADDRESS="")
    end = time.monotonic() + LIMIT_S
    while not (folder.path / "trials").is_dir() or len(finished(folder)) < 2:
        assert process.poll() is None and time.monotonic() < end, said(file)[-3000:]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(folder)
    steps = {step.name: step.stat().st_mtime_ns for step in folder.steps.iterdir() if not step.name.startswith(".")}

    process = started(file, RAY_ADDRESS="")
    assert process.wait(timeout=LIMIT_S) == 0, said(file)[-3000:]
    after, records = finished(folder), folder.records()
    assert {name: after[name] for name in before} == before, "finished points are not made again"
    assert len(records) == 4 and all(record.status in ("finished", "stopped") for record in records.values()), records
    events = [json.loads(line)["point"] for line in (folder.path / "history.jsonl").read_text().splitlines()]
    assert len(events) == len(set(events)) == 4
    costs = folder.costs()
    made = [name.partition("-")[0] for name in costs if ".ended-" not in name]
    assert all(cost.tokens > 0 and cost.cpu_s > 1 for name, cost in costs.items() if name.startswith("recover") and ".ended-" not in name)
    assert made.count("recover") <= 2 and made.count("prune") == 1, "a training for each ratio, a pruning for all"
    assert all((folder.steps / name).stat().st_mtime_ns == steps[name] for name in steps if (folder.steps / name).exists())
    front = json.loads((folder.path / "front.json").read_text())
    best = next(point for point in front["front"] if point["point"] == front["recommended"])
    assert best["published"] == Registry.open().resolve(f"{best['published']}").reference
    assert best["measured"]["decode_tokens_per_s_b16"] > 0 and best["measured"]["engine_parity"] == pytest.approx(1, abs=0.1)
    loss = {name: record.metrics["nll"] for name, record in records.items() if record.status == "finished"}
    assert loss["rank4-ratio0"] < loss["ranknone-ratio0"], "the adapter has learnt the task"


@pytest.mark.slow
def test_a_slow_rounding_comes_after_a_quick_one_and_one_that_fails_is_recorded(
    local_cluster: Any, embedded_home: Path, small_base: Path, sums: Path, tmp_path: Path
) -> None:
    """At first the point's checkpoint cannot be made: a file stands where it should."""
    from adaptfleet.on_ray.tune.compress_steps import plan

    environments = embedded_home / "environments"
    if not environments.exists():
        (TEST_HOME / "environments").mkdir(parents=True, exist_ok=True)
        environments.symlink_to(TEST_HOME / "environments")
    file, sweep = contract(tmp_path, small_base, sums, "gptq", ["bits"], finalists={"max": 0})
    values = yaml.safe_load(file.read_text())
    values["space"]["axes"]["bits"]["choices"] = {"16": None, "4": {"kind": "weight-only", "group_size": 32, "algorithm": "gptq"}}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    sweep = load_contract(SweepJob, file)
    folder = SweepFolder.open(sweep)
    job = job_of(sweep, {"bits": "4"})
    assert isinstance(job, CompressJob)
    blocked = folder.steps / plan(sweep.model_dump_json(), "", job).steps[-1].name
    blocked.write_text("in the way")
    process = started(file)
    assert process.wait(timeout=LIMIT_S) == 0, said(file)[-3000:]
    records = folder.records()
    assert records["bits16"].status == "finished" and records["bits4"].status == "failed"
    assert "bits4: failed" in said(file) and records["bits4"].reason

    blocked.unlink()
    process = started(file)
    assert process.wait(timeout=LIMIT_S) == 0, said(file)[-3000:]
    records = folder.records()
    assert {name: record.status for name, record in records.items()} == {"bits16": "finished", "bits4": "finished"}
    whole = records["bits4"].metrics
    nearest = {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in (folder.path / "quality").glob("nearest-*.json")}
    step = next(name for name in records["bits4"].steps if name.startswith("quantize-"))
    assert whole["bytes"] == nearest[step]["bytes"] and whole["nll"] != nearest[step]["nll"]
    assert not [path for path in folder.steps.iterdir() if path.name.startswith(".quantize-")], "what was rounded to nearest is gone"


def test_what_the_model_does_not_take_is_told_before_a_trial(fresh_home: Path, small_base: Path, sums: Path, tmp_path: Path) -> None:
    from adaptfleet.contracts.errors import ContractError
    from adaptfleet.on_ray.tune.sweep import run_sweep

    _, sweep = contract(tmp_path, small_base, sums, "wrong", ["ratio"])
    layers = {"path": "steps.prune.layers", "values": [0, 3]}
    axes = {**sweep.space.model_dump(mode="json")["axes"], "layers": layers}
    space = {**sweep.space.model_dump(mode="json"), "axes": axes, "baseline": {"ratio": 0.0, "layers": 0}}
    wrong = SweepJob.model_validate({"name": "wrong", "space": space})
    with pytest.raises(ContractError, match="ratio0-layers3: prune: layers is 3, but the model has 3"):
        run_sweep(wrong)
    assert not (fresh_home / "runs").exists()
