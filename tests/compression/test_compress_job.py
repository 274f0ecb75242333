"""`jobs/compress.py`: from a contract to a measured, published checkpoint; through kills; and what is refused beforehand."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import AdaptfleetError, ContractError, DataError, StoreError, TrainingError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.core.models.loading import base_revision
from adaptfleet.core.quantization.fit import Shapes
from adaptfleet.on_ray.compress import preflight
from adaptfleet.on_ray.compress.compression import run_compression
from adaptfleet.on_ray.compress.preflight import check_disk, prepare
from adaptfleet.on_ray.compress.recipe_folder import made_once, steps_folder
from adaptfleet.store.registry import Registry
from tests.serve.tiny_llama import make_adapter

PRUNE = {"kind": "prune", "mlp_width": 0.4, "importance": "taylor"}


@pytest.fixture(autouse=True)
def _home(compression_home: Path) -> Iterator[None]:
    yield


def contract(base: Path, rows: Path, *steps: Any, **sections: Any) -> CompressJob:
    job = {
        "model": {"source": str(base), "dtype": "float32"},
        "calibration": {"data": {"train": str(rows)}, "num_rows": 32},
        "proof": {"max_rows": 8, "num_resamples": 200, "engine": False},
        "steps": list(steps),
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
    return parse_contract(CompressJob, yaml.safe_dump(job))


def test_a_pruned_model_is_published_with_its_proof(small_base: Path, sums: Path) -> None:
    job = contract(
        small_base,
        sums,
        PRUNE,
        {"kind": "publish", "name": "narrow"},
        proof={"out_of_domain": {"train": str(sums), "seed": 3}, "answers": True, "max_new_tokens": 4},
    )
    registry = Registry.open()
    assert run_compression(job) == "narrow@1"
    manifest = registry.resolve("narrow")
    assert manifest.kind == "model" and manifest.serves_adapters_of is None
    assert manifest.method and [step["kind"] for step in manifest.method["steps"]] == ["prune"]
    assert manifest.parents[0] == f"base:small-llama:{base_revision(small_base)[:16]}"
    assert {"bytes", "bytes_ratio", "perplexity_in_domain_low", "perplexity_ratio_out_of_domain", "exact_match_in_domain_parent"} <= set(
        manifest.metrics
    )
    assert 0.5 < manifest.metrics["bytes_ratio"] < 0.95
    low, ratio, high = (manifest.metrics[f"perplexity_ratio_in_domain{end}"] for end in ("_low", "", "_high"))
    assert low <= ratio <= high and ratio != 1
    folder = registry.fetch(manifest, Path(os.environ["ADAPTFLEET_HOME"]) / "fetched")
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 128
    page = (Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / job.run_name() / "report.html").read_text()
    assert "narrow@1" in page and "<svg" in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert run_compression(job) == "narrow@1", "the same contract is not run again"
    assert registry.versions("narrow") == [1]


def test_a_tuned_model_takes_its_parents_adapters_at_a_measured_loss(small_base: Path, sums: Path, tmp_path: Path) -> None:
    registry, revision = Registry.open(), base_revision(small_base)
    draft = Draft(kind="adapter", name="task", base="small-llama", base_revision=revision, method={"kind": "lora", "rank": 4})
    registry.publish(draft, make_adapter(small_base, tmp_path / "adapter", rank=4))
    job = contract(
        small_base,
        sums,
        {"kind": "quantize", "scheme": {"kind": "weight-only"}},
        {"kind": "tune", "num_rows": 32, "train": {"epochs": 4, "pack_tokens": 128, "learning_rate": 0.01}},
        {"kind": "publish", "name": "tuned"},
        proof={"adapters": ["task"]},
    )
    assert run_compression(job) == "tuned@1"
    manifest = registry.resolve("tuned")
    assert manifest.serves_adapters_of == revision
    ratio = manifest.metrics["perplexity_ratio_in_domain_with_task@1"]
    assert ratio != manifest.metrics["perplexity_ratio_in_domain"] and 0.8 < ratio < 1.25
    page = (Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / job.run_name() / "report.html").read_text()
    assert "in domain, with task@1" in page
    other = Draft(kind="adapter", name="other", base="another", base_revision="0" * 64, method={"kind": "lora", "rank": 4})
    registry.publish(other, tmp_path / "adapter")
    wrong = contract(small_base, sums, {"kind": "quantize"}, proof={"adapters": ["other", "tuned", "nobody"]})
    message = refused(AdaptfleetError, wrong)
    assert "other@1 fits another of revision 0000" in message and "tuned@1 is of the kind model, no adapter" in message
    assert "nobody" in message


def test_a_rotated_and_rounded_model_is_near_its_parent(small_base: Path, sums: Path) -> None:
    scheme = {"kind": "w8a8", "smoothquant": 0.5}
    job = contract(small_base, sums, {"kind": "quantize", "scheme": scheme, "rotate": True, "head": "w8a8", "embedding": "w8"})
    folder = Path(run_compression(job))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    proof = json.loads((Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / job.run_name() / "proof.json").read_text())
    assert proof["perplexity_ratio"]["in_domain"]["value"] == pytest.approx(1, abs=0.02)
    assert not list(steps_folder().glob(".*")), "what was turned on the way is gone"
    tied = contract(small_base, sums, {"kind": "quantize", "rotate": True})
    assert "rotate gives the output head weights of its own" in refused(ContractError, tied)


def test_nothing_pruned_is_the_parent(small_base: Path, sums: Path) -> None:
    folder = Path(run_compression(contract(small_base, sums, {"kind": "prune"})))
    assert (folder / "model.safetensors").read_bytes() == (small_base / "model.safetensors").read_bytes()
    proof = json.loads(
        (Path(os.environ["ADAPTFLEET_HOME"]) / "runs" / contract(small_base, sums, {"kind": "prune"}).run_name() / "proof.json").read_text()
    )
    assert proof["perplexity_ratio"]["in_domain"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_other_ratios_take_the_scores_that_were_measured(small_base: Path, sums: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run_compression(contract(small_base, sums, {"kind": "prune", "mlp_width": 0.2, "round_to": 32}))
    assert "as measured before" in caplog.text


def test_a_step_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTFLEET_HOME", str(tmp_path))

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise AdaptfleetError("no")

    with pytest.raises(AdaptfleetError):
        made_once("prune", "k", fails)
    assert list(steps_folder().iterdir()) == []
    # what a killed process left: its number is nobody's
    ended = subprocess.Popen(["true"])
    ended.wait()
    (steps_folder() / f".prune-k.{ended.pid}").mkdir()
    made = made_once("prune", "k", lambda folder: (folder / "whole").touch())
    assert [p.name for p in steps_folder().iterdir()] == ["prune-k"] and (made.folder / "whole").exists()
    made_once("prune", "k", fails)


def refused(kind: type[Exception], job: CompressJob) -> str:
    with pytest.raises(kind) as caught:
        prepare(job, Registry.open())
    return str(caught.value)


@pytest.mark.parametrize(
    "kind, flags, is_warned",
    [("weight-only", (), True), ("weight-only", ("amx_int8",), False), ("weight-only", ("avx512_vnni",), False), ("w8a8", (), False)],
)
def test_four_bits_without_their_kernel_are_warned_of(
    small_base: Path,
    sums: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    flags: tuple[str, ...],
    is_warned: bool,
) -> None:
    monkeypatch.setattr(preflight, "cpu_flags", lambda: frozenset(flags))
    prepare(contract(small_base, sums, {"kind": "quantize", "scheme": {"kind": kind}}), Registry.open())
    assert ("neither AMX nor" in caplog.text) == is_warned


def test_what_cannot_be_is_refused_all_at_once(small_base: Path, sums: Path) -> None:
    job = contract(
        small_base, sums,
        {"kind": "prune", "layers": 3},
        {"kind": "publish", "name": "small-llama"},
        calibration={"num_rows": 5000},
        proof={"out_of_domain": {"train": "no-such-file.jsonl"}},
    )  # fmt: skip
    message = refused(ContractError, job)
    assert "publish.name is 'small-llama', the parent's own id" in message
    assert "layers is 3, but the model has 3, one of which must stay" in message
    assert "training rows, but num_rows asks for 5000. Lower calibration.num_rows" in message
    assert "proof.out_of_domain: " in message and "no-such-file.jsonl" in message


def test_calibration_rows_of_another_kind(small_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "have a chosen and a rejected answer; calibration takes rows of" in refused(DataError, contract(small_base, file, PRUNE))


def test_calibration_rows_too_short(small_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(60)))
    assert "fewer than 512, which say too little of activations" in refused(DataError, contract(small_base, file, PRUNE))


NARROW = {"kind": "prune", "mlp_width": 0.1, "round_to": 32}
MISFITS: list[tuple[list[Any], dict[str, Any], str]] = [
    ([], {"kind": "weight-only", "group_size": 128}, "group_size 128 does not divide the inputs of q_proj (64)"),
    (
        [NARROW],
        {"kind": "weight-only", "group_size": 64},
        "64 does not divide the inputs of down_proj (160). Use group_size 32, or keep them.",
    ),
    ([], {"kind": "mixed", "max_bytes": 1000}, "the budget is 1,000 bytes, but with 4 bits everywhere the checkpoint has"),
]


@pytest.mark.parametrize(("before", "scheme", "message"), MISFITS, ids=lambda value: str(value)[:20])
def test_schemes_are_held_against_the_shapes_they_will_find(
    small_base: Path, sums: Path, before: list[Any], scheme: dict[str, Any], message: str
) -> None:
    assert message in refused(ContractError, contract(small_base, sums, *before, {"kind": "quantize", "scheme": scheme}))


def test_too_little_disk(small_base: Path, sums: Path) -> None:
    huge = Shapes({"model.layers.0.mlp.up_proj": (2**22, 2**22)}, (10, 10), (10, 10), True, 0)
    job = contract(small_base, sums, {"kind": "prune", "mlp_width": 0.1}, {"kind": "publish", "name": "narrow"})
    with pytest.raises(StoreError) as caught:
        check_disk(job, huge)
    num_bytes = 2 * (2**44 + 100)
    assert f"prune {num_bytes + 2**25:,}; publishing {num_bytes + 2**25:,}" in str(caught.value)
    assert f"the recipe writes {2 * (num_bytes + 2**25):,} there" in str(caught.value) and "bytes free" in str(caught.value)


def test_too_little_disk_counts_what_is_turned_on_the_way(small_base: Path, sums: Path) -> None:
    huge = Shapes({"model.layers.0.mlp.up_proj": (2**22, 2**22)}, (10, 10), (10, 10), True, 0)
    job = contract(small_base, sums, {"kind": "quantize", "rotate": True, "head": "w8a8", "embedding": "w8"})
    with pytest.raises(StoreError, match=rf"rotate {2 * (2**44 + 200) + 2**25:,}, quantize "):
        check_disk(job, huge)


def test_a_run_of_another_contract(small_base: Path, sums: Path) -> None:
    run_compression(contract(small_base, sums, {"kind": "prune"}, run="mine"))
    with pytest.raises(TrainingError, match="was begun with another contract"):
        run_compression(contract(small_base, sums, {"kind": "prune", "round_to": 32}, run="mine"))
