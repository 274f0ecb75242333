"""`jobs/finetune.py` on a real cluster: through `ray job submit`, through kills, on two workers, and with what cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.state import list_actors
from safetensors.torch import load_file

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.program import run_job
from adaptfleet.core.checkpoint import read_progress
from adaptfleet.on_ray.joining import connected
from adaptfleet.on_ray.local_cluster import LocalCluster
from adaptfleet.store.registry import Registry
from jobs.finetune import start

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 400
ADAPTER = "adapter_model.safetensors"
Job = dict[str, Any]


@pytest.fixture(scope="module")
def contract(tiny_base: Path, sums_file: Path) -> Callable[..., Job]:
    def make(name: str, **sections: dict[str, Any]) -> Job:
        job: Job = {
            "job": "finetune",
            "model": {"source": str(tiny_base), "dtype": "float32"},
            "data": {"train": str(sums_file)},
            "method": {"rank": 4},
            "train": {"epochs": 2, "pack_tokens": 64, "packs_per_step": 2, "learning_rate": 0.01, "compile": "off"},
            "evaluation": {"max_generated_rows": 4, "max_new_tokens": 12},
            "checkpoint": {"every_steps": 5},
            "cluster": {"workers": 1, "cpus_per_worker": 1},
            "publish": {"name": name},
        }
        for section, values in sections.items():
            job[section] = {**job.get(section, {}), **values}
        return job

    return make


def write(job: Job, folder: Path) -> Path:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def command(file: Path) -> list[str]:
    return [sys.executable, str(REPOSITORY / "jobs" / "finetune.py"), "--config", str(file)]


def run(job: Job, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(write(job, folder)), capture_output=True, text=True, timeout=LIMIT_S, cwd=REPOSITORY, check=False)


def refused(job: Job, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a job says that ends before it trains: the same program in this process, which has its libraries at hand."""
    assert run_job(FinetuneJob, "", start, ["--config", str(write(job, folder))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


def run_folder(job: Job) -> Path:
    spec = parse_contract(FinetuneJob, yaml.safe_dump(job))
    return Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / spec.run_name()


def losses(job: Job) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_folder(job) / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    return {line["step"]: line["loss"] for line in train}


def wait_for_step(job: Job, step: int, process: subprocess.Popen[str]) -> int:
    """Waits until the run has made a step; returns the training worker's process id."""
    progress_file = run_folder(job) / "progress.json"
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if progress_file.exists():
            progress = json.loads(progress_file.read_text())
            if progress["step"] >= step:
                return int(progress["pid"])
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {LIMIT_S} s")


def kill_while_it_writes(job: Job, pid: int, process: subprocess.Popen[str]) -> Path:
    """Stops the worker whenever a checkpoint appears in the run's folder, and kills it where files are still missing. Returns that one."""
    end = time.monotonic() + LIMIT_S
    seen: set[str] = set()
    while time.monotonic() < end and process.poll() is None:
        for place in run_folder(job).glob("checkpoint_*"):
            if place.name in seen or not place.is_dir():
                continue
            os.kill(pid, signal.SIGSTOP)
            if not (place / "progress.json").exists() or not list(place.glob("*.safetensors")):
                os.kill(pid, signal.SIGKILL)
                return place
            seen.add(place.name)
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.0002)
    process.kill()
    raise AssertionError("no checkpoint was seen half written: " + process.communicate()[0][-3000:])


def actors() -> dict[str, str]:
    """The classes of all actors that the cluster has had, by their ids."""
    with connected():
        return {actor.actor_id: actor.class_name for actor in list_actors(limit=10_000)}


@pytest.fixture(scope="module")
def undisturbed(local_cluster: Any, contract: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run submitted as users do, which the others are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = contract("sums")
    lines: list[str] = []
    argv = ["python", "jobs/finetune.py", "--config", str(write(job, folder))]
    status = local_cluster.submit(argv, REPOSITORY, show=lines.append, check=False)
    assert status == 0, "\n".join(lines[-40:])
    return job


def test_a_submitted_job_trains_and_publishes(undisturbed: Job) -> None:
    manifest = Registry.open().resolve("sums")
    curve = losses(undisturbed)
    assert curve[len(curve)] < 0.7 * curve[1]
    assert {"eval_loss", "eval_perplexity", "exact_match", "field_f1", "valid_json", "train_loss", "train_tokens_per_s"} <= set(
        manifest.metrics
    )
    assert set(manifest.files) == {"adapter_config.json", ADAPTER}
    assert manifest.base == "tiny-llama" and manifest.base_revision and len(manifest.base_revision) == 64
    assert manifest.method is not None and manifest.method["rank"] == 4
    folder = run_folder(undisturbed)
    assert {"contract.json", "facts.json", "metrics.jsonl", "tensorboard", "adapter"} <= {f.name for f in folder.iterdir()}
    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 4 and all(s["before"] is not None and s["after"] is not None for s in samples)
    assert [s["before"] for s in samples] != [s["after"] for s in samples]
    report = (folder / "report.html").read_text()
    assert "sums@1" in report and f"step {len(curve)}: {curve[len(curve)]:.6g}" in report


def test_the_same_contract_is_not_trained_again(undisturbed: Job, tmp_path: Path) -> None:
    again = run(undisturbed, tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to train" in again.stdout
    assert Registry.open().versions("sums") == [1]


def test_two_workers_have_the_losses_of_one(undisturbed: Job, contract: Callable[..., Job], tmp_path: Path) -> None:
    job = contract("sums-two", cluster={"workers": 2})
    before = actors().keys()
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    started = [name for key, name in actors().items() if key not in before]
    # each is a process, with imports of its own
    assert sorted(started) == ["RayTrainWorker", "RayTrainWorker", "SynchronizationActor", "TrainController"]
    one, two = losses(undisturbed), losses(job)
    assert one.keys() == two.keys()
    # gradients are summed in another order; AdamW divides by their size, so the difference grows a little with each step
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 2e-3
    assert max(abs(one[s] - two[s]) / one[s] for s in list(one)[:5]) < 1e-5


def test_layers_cut_between_two_workers_have_the_losses_of_one(undisturbed: Job, contract: Callable[..., Job], tmp_path: Path) -> None:
    job = contract(
        "sums-cut",
        cluster={"workers": 2, "tensor_parallel": 2},
        train={"packs_per_step": None, "tokens_per_step": 128, "gradient_checkpointing": "on"},
    )
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "every layer cut between 2 workers" in result.stdout and "gradient checkpointing on" in result.stdout
    one, two = losses(undisturbed), losses(job)
    assert one.keys() == two.keys()
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 2e-3
    whole, cut = (load_file(Registry.open().fetch(Registry.open().resolve(name), tmp_path) / ADAPTER) for name in ("sums", "sums-cut"))
    assert {key: value.shape for key, value in cut.items()} == {key: value.shape for key, value in whole.items()}
    assert max(float((cut[key] - whole[key]).norm() / whole[key].norm()) for key in whole) < 2e-2


def test_a_base_in_four_bits_is_sharded_over_two_workers(local_cluster: Any, contract: Callable[..., Job], tmp_path: Path) -> None:
    job = contract("four-bits", method={"kind": "qlora"}, cluster={"workers": 2, "shard": "fsdp2"}, train={"max_steps": 40})
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    curve = losses(job)
    assert curve[40] < 0.8 * curve[1]
    assert Registry.open().resolve("four-bits").kind == "model"


def test_preferences_are_learnt_and_published(local_cluster: Any, contract: Callable[..., Job], tmp_path: Path) -> None:
    file = tmp_path / "preferences.jsonl"
    rows = [{"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": f"about {a + b + 1}"} for a in range(8) for b in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = contract(
        "preferences", data={"train": str(file)}, train={"pack_tokens": 128, "epochs": 4}, objective={"kind": "dpo", "beta": 0.5}
    )
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    manifest = Registry.open().resolve("preferences")
    assert manifest.metrics["preference_accuracy"] > 0.9 and manifest.metrics["eval_loss"] < 0.5
    assert losses(job)[1] == pytest.approx(0.6931, abs=1e-3)
    supervised = run(contract("supervised", data={"train": str(file)}), tmp_path)
    assert supervised.returncode == 2 and "takes objective.kind dpo or orpo" in supervised.stderr


def test_a_killed_worker_is_replaced_and_the_losses_are_the_same(undisturbed: Job, contract: Callable[..., Job], tmp_path: Path) -> None:
    job = contract("sums-worker-killed")
    with subprocess.Popen(
        command(write(job, tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    ) as process:
        os.kill(wait_for_step(job, 12, process), signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output[-3000:]
    assert losses(job) == losses(undisturbed)


def test_a_worker_killed_while_it_writes_a_checkpoint_goes_on_from_a_whole_one(
    undisturbed: Job, contract: Callable[..., Job], tmp_path: Path
) -> None:
    job = contract("sums-torn", checkpoint={"every_steps": 2, "keep": 1000})
    with subprocess.Popen(
        command(write(job, tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    ) as process:
        torn = kill_while_it_writes(job, wait_for_step(job, 3, process), process)
        output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output[-3000:]
    assert losses(job) == losses(undisturbed)
    kept = [place for place in run_folder(job).glob("checkpoint_*") if place.is_dir() and place != torn]
    steps = {read_progress(place)["step"] for place in kept}
    assert {2, len(losses(job))} <= steps
    with pytest.raises(TrainingError, match="is torn"):
        read_progress(torn)


def test_a_worker_that_dies_more_often_than_allowed_ends_the_run_and_keeps_it(
    local_cluster: Any, contract: Callable[..., Job], tmp_path: Path
) -> None:
    job = contract("sums-given-up", cluster={"max_failures": 0})
    with subprocess.Popen(
        command(write(job, tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    ) as process:
        os.kill(wait_for_step(job, 12, process), signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2, output[-3000:]
    assert "error: workers failed 1 times, more than cluster.max_failures (0) allows" in output and "Traceback" not in output[-2000:]
    assert "sums-given-up" not in Registry.open().names()
    assert list(run_folder(job).glob("checkpoint_*"))


def test_a_killed_job_goes_on_when_submitted_again(undisturbed: Job, contract: Callable[..., Job], tmp_path: Path) -> None:
    job = contract("sums-job-killed")
    with subprocess.Popen(
        command(write(job, tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    ) as process:
        wait_for_step(job, 12, process)
        process.kill()
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert losses(job) == losses(undisturbed)


def test_a_program_that_finds_no_cluster_trains_on_one_of_its_own(
    embedded_home: Path, contract: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    result = run(contract("sums-alone", train={"max_steps": 1}), tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.strip().endswith("sums-alone@1")


def test_a_training_whose_task_is_ended_frees_its_cpus(local_cluster: Any, contract: Callable[..., Job]) -> None:
    """As a search ends a trial: its job lives on. Another cluster on the machine is none of its business."""
    spec = parse_contract(FinetuneJob, yaml.safe_dump(contract("sums-ended", train={"epochs": 1000})))

    def train(spec: FinetuneJob, address: str) -> None:
        from adaptfleet.on_ray.train.finetune import run_finetune

        os.environ["RAY_ADDRESS"] = address
        run_finetune(spec)

    def wait_until(what: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not what() and time.monotonic() < end:
            time.sleep(0.2)
        return what()

    progress = Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / spec.run_name() / "progress.json"
    with LocalCluster.start(num_cpus=1), connected():
        import ray

        def free_cpus() -> float:
            return float(ray.available_resources().get("CPU", 0))

        before = float(ray.cluster_resources()["CPU"])
        assert wait_until(lambda: free_cpus() == before, 60), "an earlier test's job still runs"
        task = ray.remote(num_cpus=0, max_retries=0)(train).remote(spec, os.environ["RAY_ADDRESS"])
        assert wait_until(lambda: progress.exists() and json.loads(progress.read_text())["step"] > 5, LIMIT_S)
        assert free_cpus() == before - 1
        ray.cancel(task, force=True)
        assert wait_until(lambda: free_cpus() == before, 60), "what the training had is still taken"


def test_a_loss_that_is_no_number_ends_the_run_and_publishes_nothing(
    local_cluster: Any, contract: Callable[..., Job], tmp_path: Path
) -> None:
    job = contract("sums-diverged", train={"learning_rate": 1e30, "warmup_fraction": 0})
    result = run(job, tmp_path)
    assert result.returncode == 2
    assert "the loss of step" in result.stderr and "Lower train.learning_rate" in result.stderr
    assert "sums-diverged" not in Registry.open().names()


def test_more_than_the_cluster_has_is_refused_at_once(
    local_cluster: Any, contract: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = contract("sums-large", cluster={"workers": 2, "cpus_per_worker": 8})
    assert "want 16 CPUs where the cluster has 3" in refused(large, tmp_path, capsys)


def test_faults_of_model_data_and_method_are_reported_together(embedded_home: Path, contract: Callable[..., Job], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\nnot json\n{"prompt": "a", "completion": "b"}\n')
    result = run(contract("bad", data={"train": str(rows)}, method={"targets": ["q_porj"]}), tmp_path)
    assert result.returncode == 2
    for fact in ("Did you mean 'q_proj'", "line 1", "line 2"):
        assert fact in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("data", {"train": "missing.jsonl"}, "missing.jsonl"),
        ("model", {"source": "/nowhere"}, "is no folder"),
        ("method", {"rank": 400}, "more than the smaller side"),
        ("train", {"pack_tokens": 16}, "tokens"),
    ],
)
def test_one_fault_is_named(
    embedded_home: Path,
    contract: Callable[..., Job],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    values: dict[str, Any],
    says: str,
) -> None:
    assert says in refused(contract("bad", **{section: values}), tmp_path, capsys)


def test_a_run_of_another_contract_is_not_overwritten(
    undisturbed: Job, contract: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = contract("sums-other") | {"run": run_folder(undisturbed).name}
    assert "was begun with another contract" in refused(job, tmp_path, capsys)
