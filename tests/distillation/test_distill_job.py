"""`jobs/distill.py` on a real cluster: a student published as a model with its teacher in the lineage, and what is refused before."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptfleet.cli import main
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import DistillJob, FinetuneJob, stored_job
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.store.registry import Registry
from tests.distillation.conftest import make_llama, make_other_tokenizer
from tests.training.conftest import make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 400
Job = dict[str, Any]


@pytest.fixture(scope="module")
def contract(model_folder: Callable[..., Path], sums_file: Path) -> Callable[..., Job]:
    def make(name: str, **sections: dict[str, Any]) -> Job:
        job: Job = {
            "job": "distill",
            "model": {"source": str(model_folder("student")), "dtype": "float32"},
            "objective": {"teacher": {"source": str(model_folder("teacher")), "dtype": "float32"}, "alpha": 0.7},
            "data": {"train": str(sums_file)},
            "method": {"kind": "full"},
            "train": {"epochs": 1, "pack_tokens": 64, "packs_per_step": 2, "learning_rate": 0.01, "compile": "off"},
            "evaluation": {"max_generated_rows": 2, "max_new_tokens": 8, "max_sample_rows": 0},
            "checkpoint": {"every_steps": 5},
            "cluster": {"workers": 1, "cpus_per_worker": 1},
            "publish": {"name": name},
        }
        for section, values in sections.items():
            job[section] = {**job.get(section, {}), **values}
        return job

    return make


def command(job: Job, folder: Path) -> list[str]:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return [sys.executable, str(REPOSITORY / "jobs" / "distill.py"), "--config", str(file)]


def run(job: Job, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(job, folder), capture_output=True, text=True, timeout=LIMIT_S, cwd=REPOSITORY, check=False)


def run_folder(job: Job) -> Path:
    return Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / parse_contract(DistillJob, yaml.safe_dump(job)).run_name()


def losses(job: Job) -> list[float]:
    lines = [json.loads(line) for line in (run_folder(job) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def wait_for_files(num: int, process: subprocess.Popen[str]) -> dict[Path, int]:
    """Waits until so many files of the teacher's distributions are there; returns them with their times."""
    cache = Path(os.environ["ADAPTFLEET_HOME"]) / "cache" / "teacher-logits"
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        there = list(cache.glob("*/part-*.parquet"))
        if len(there) >= num:
            return {file: file.stat().st_mtime_ns for file in there}
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    raise AssertionError(f"{num} files were not there in {LIMIT_S} s")


@pytest.fixture(scope="module")
def online(local_cluster: Any, contract: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = contract("small-sums")
    result = run(job, tmp_path_factory.mktemp("online"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return job


def test_the_student_is_published_as_a_model_with_its_teacher_in_the_lineage(online: Job, model_folder: Callable[..., Path]) -> None:
    manifest = Registry.open().resolve("small-sums")
    assert manifest.kind == "model" and {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.files)
    facts = json.loads((run_folder(online) / "facts.json").read_text())
    assert f"teacher:tiny-teacher:{facts['teacher']['revision'][:16]}" in manifest.parents
    assert any(parent.startswith("base:tiny-student:") for parent in manifest.parents)
    curve = losses(online)
    assert curve[-1] < 0.9 * curve[0] and "eval_perplexity" in manifest.metrics
    weights = (run_folder(online) / "model" / "model.safetensors").stat().st_size
    assert weights == (model_folder("student") / "model.safetensors").stat().st_size


def test_a_published_student_teaches_an_adapter_on_two_workers(online: Job, contract: Callable[..., Job], tmp_path: Path) -> None:
    job = contract(
        "taught",
        objective={
            "teacher": {"source": "small-sums", "dtype": "float32"},
            "divergence": "jsd",
            "align": {"hidden": 0.1, "attention": 0.1},
        },
        method={"kind": "lora", "rank": 4},
        cluster={"workers": 2},
    )
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    manifest = Registry.open().resolve("taught")
    assert manifest.kind == "adapter" and any(parent.startswith("teacher:small-sums@1:") for parent in manifest.parents)


def test_a_killed_scoring_goes_on_and_a_kept_teacher_teaches_the_same(online: Job, contract: Callable[..., Job], tmp_path: Path) -> None:
    source = {"kind": "offline", "k": 1000, "precision": "float32", "rows_per_file": 1}
    job = contract("small-offline", objective={**online["objective"], "source": source})
    with subprocess.Popen(command(job, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY) as process:
        there = wait_for_files(1, process)
        process.kill()
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    told = re.search(r"the teacher scores (\d+) of (\d+) files of rows; (\d+) are there", result.stdout)
    assert told is not None and int(told[3]) >= len(there) and int(told[1]) < int(told[2]), result.stdout[-3000:]
    facts = json.loads((run_folder(job) / "facts.json").read_text())
    files = list(Path(facts["teacher"]["logits"]).iterdir())
    assert len(files) == facts["num_train_rows"] == int(told[2]) and {f.name for f in there} <= {f.name for f in files}
    assert all(file.stat().st_mtime_ns == written for file, written in there.items())
    # the same distributions, summed by likelihood; AdamW divides by the gradients' size, so the difference grows a little with each step
    assert losses(job) == pytest.approx(losses(online), rel=1e-3)
    again = contract("small-offline-again", objective=job["objective"], train={"max_steps": 1}, method={"kind": "lora", "rank": 2})
    assert "rows are in the cache" in run(again, tmp_path).stdout


def test_a_student_learns_from_its_own_answers(local_cluster: Any, contract: Callable[..., Job], tmp_path: Path) -> None:
    source = {"kind": "on_policy", "share": 0.7, "every_steps": 4}
    job = contract("small-on-policy", objective={"divergence": "reverse_kl", "alpha": 1.0, "source": source}, train={"max_steps": 6})
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert len(losses(job)) == 6 and Registry.open().resolve("small-on-policy").kind == "model"


def test_a_teacher_of_another_tokenizer_teaches_by_pieces_of_text(local_cluster: Any, contract: Callable[..., Job], tmp_path: Path) -> None:
    other = tmp_path / "other-teacher"
    make_llama("teacher", 360).save_pretrained(other)
    make_other_tokenizer().save_pretrained(other)
    objective = {"teacher": {"source": str(other), "dtype": "float32"}, "unit": "piece", "temperature": 10.0}
    job = contract("small-by-pieces", objective=objective, cluster={"workers": 2})
    result = run(job, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert losses(job)[-1] < 0.9 * losses(job)[0]
    manifest = Registry.open().resolve("small-by-pieces")
    assert any(parent.startswith("teacher:other-teacher:") for parent in manifest.parents)
    # the student is served with its own tokenizer
    assert (run_folder(job) / "model" / "chat_template.jinja").read_text() == make_tokenizer().chat_template


def test_a_teacher_of_another_vocabulary_is_refused_before_training(
    embedded_home: Path, contract: Callable[..., Job], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other-teacher"
    other.mkdir()
    for file in model_folder("teacher").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(other)
    result = run(contract("refused", objective={"teacher": {"source": str(other)}}, data={"train": "missing.jsonl"}), tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        "another vocabulary than the student" in result.stderr
        and "objective.unit=piece" in result.stderr
        and "missing.jsonl" in result.stderr
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.beta=0.3", "beta is 0.3, but divergence 'forward_kl' has none"),
        ("objective.alpha=0", "the teacher would do nothing"),
        ("objective={teacher: {}, source: {kind: offline}, align: {hidden: 1.0}}", "source.kind 'offline' does not keep"),
        ("objective={teacher: {}, source: {kind: on_policy}, alpha: 0, align: {hidden: 1.0}}", "would teach it nothing"),
        ("objective.align={layers: {0: 1}}", "layers are given, but hidden and attention are both 0"),
        ("objective={teacher: {}, source: {kind: on-policy}}", "Allowed: online, offline, on_policy"),
        ("objective={}", "objective.teacher: missing"),
        ("job=finetune", "finetune"),
    ],
)
def test_contracts_that_cannot_be(override: str, says: str) -> None:
    with pytest.raises(ContractError, match=says.replace("(", r"\(")):
        parse_contract(DistillJob, "objective: {teacher: {}}\npublish: {name: a}\n", [override])
    with pytest.raises(ContractError, match="virtual tokens such as 'prefix'"):
        overrides = ["method={kind: prefix}", "publish=null", "objective.source={kind: on_policy}"]
        parse_contract(DistillJob, "objective: {teacher: {}}\npublish: {name: a}\n", overrides)


def test_the_data_of_a_distillation_can_be_looked_at(
    embedded_home: Path, contract: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(contract("looked-at"), tmp_path)
    assert main(["validate", "--config", str(tmp_path / "job.yaml")]) == 0
    assert "This can be trained on." in capsys.readouterr().out


def test_a_stored_contract_is_read_back_as_what_it_was() -> None:
    job = parse_contract(DistillJob, "objective: {teacher: {}, align: {hidden: 1.0, layers: {0: 1}}}\npublish: {name: a}\n")
    assert stored_job(job.model_dump_json()) == job
    assert type(stored_job(parse_contract(FinetuneJob, "publish: {name: a}").model_dump_json())) is FinetuneJob
