"""Several workers in real processes over gloo: the losses of one, sharded or not, and checkpoints that any number of workers takes up."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import AdaLora, Full, Lora, Method, PrefixTuning, PromptTuning, QLora
from adaptfleet.core.checkpoint import read_progress, read_tensors, write_checkpoint
from adaptfleet.core.compilation import compile_layers
from adaptfleet.core.evaluation.held_out import held_out_loss
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.methods.qlora import quantization_config
from adaptfleet.core.recomputation import recompute_layers
from adaptfleet.core.sharding import choose_placement, shard, worker_mesh
from adaptfleet.core.steps import plan_steps
from tests.training.test_methods import make_model, rows
from tests.workers import meeting, run_workers

METHODS: dict[str, Method] = {
    "lora": Lora(rank=4, alpha=8, dropout=0.0),
    "full": Full(),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "adalora": AdaLora(rank=2, initial_rank=4, every_steps=2),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "qlora": QLora(rank=4, alpha=8),
}
ALONE = ("lora", "full", "prefix", "adalora", "qlora")
STEPS = 6


@dataclass(frozen=True)
class Run:
    """A training run, as its workers are told of it."""

    method: str
    mode: str = "none"
    num_workers: int = 1
    tensor_parallel: int = 1
    architecture: str = "llama"
    compiled: bool = False
    recomputed: bool = False
    stop: int = STEPS


def make_base(run: Run, folder: Path) -> PreTrainedModel:
    method = METHODS[run.method]
    if not isinstance(method, QLora):
        return make_model(run.architecture)
    # transformers quantizes as it loads
    config = quantization_config(method, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, device_map={"": "cpu"})
    return base.requires_grad_(False)


def make_trainer(run: Run, folder: Path) -> Trainer:
    # three packs a step: two workers cannot share them evenly
    train = TrainSpec(epochs=9, max_steps=STEPS, pack_tokens=64, packs_per_step=3, learning_rate=0.01)
    adapted = adaptation(METHODS[run.method])
    model = adapted.attach(make_base(run, folder), 0)
    if run.compiled:
        compile_layers(model)
    if run.recomputed:
        recompute_layers(model)
    mesh = worker_mesh("cpu", run.num_workers, run.tensor_parallel) if run.mode == "fsdp2" else None
    call = shard(model, mesh) if mesh else None
    data = rows()
    return Trainer(model, adapted, train, plan_steps(data, train), data, 0, call=call, mesh=mesh)


def work(rank: int, folder: Path, run: Run) -> None:
    """One worker: goes on from the folder's checkpoint if there is one, stops after `stop` steps and writes one."""
    with meeting(folder / f"meet-{run.stop}", rank, run.num_workers):
        trainer = make_trainer(run, folder)
        checkpoints = sorted(folder.glob("checkpoint-*"))
        if checkpoints:
            progress = read_progress(checkpoints[-1])
            trainer.load_state(read_tensors(checkpoints[-1], trainer.state()), progress["step"])
        losses, norms = [], []
        for result in trainer.run():
            losses.append(result.loss)
            norms.append(result.grad_norm)
            if result.step == run.stop:
                break
        held_out = held_out_loss(trainer.model, rows(6), 64, 0, trainer.call).loss
        state = trainer.state()
        if rank == 0 or run.mode == "fsdp2":
            write_checkpoint(folder / f"checkpoint-{run.stop}", state, {"step": run.stop}, rank)
        total = sum(float(weight.double().abs().sum()) for weight in trainer.optimizer.whole_weights().values())
        if rank == 0:
            result = {"losses": losses, "norms": norms, "held_out": held_out, "sum": total}
            (folder / f"result-{run.stop}.json").write_text(json.dumps(result))


def result_of(run: Run, folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    if isinstance(METHODS[run.method], QLora):
        make_model(run.architecture).save_pretrained(folder / "base")
    run_workers(work, run.num_workers, folder, run)
    return json.loads((folder / f"result-{run.stop}.json").read_text())


def assert_same(one: dict, other: dict) -> None:
    # sums in another order; AdamW divides by their size, so the difference grows a little with each step
    assert other["losses"] == pytest.approx(one["losses"], rel=2e-3)
    assert other["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
    assert other["held_out"] == pytest.approx(one["held_out"], rel=2e-3)
    assert other["sum"] == pytest.approx(one["sum"], rel=2e-3)
    assert other["norms"] == pytest.approx(one["norms"], rel=2e-2)
    assert other["norms"][0] == pytest.approx(one["norms"][0], rel=1e-4)


def joined(parts: list[Run], folder: Path) -> dict:
    """Runs that each go on from the one before, as one."""
    results = [result_of(part, folder) for part in parts]
    return {**results[-1], **{curve: [value for result in results for value in result[curve]] for curve in ("losses", "norms")}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: result_of(Run(method), folder / method) for method in ALONE}


@pytest.mark.parametrize(
    ("method", "mode"), [(m, "fsdp2") for m in ("lora", "full", "prefix", "qlora")] + [(m, "ddp") for m in ("lora", "adalora")]
)
def test_two_workers_have_the_losses_of_one(alone: dict[str, dict], method: str, mode: str, tmp_path: Path) -> None:
    assert_same(alone[method], result_of(Run(method, mode, 2), tmp_path / "two"))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_sharded_layers_can_be_compiled(alone: dict[str, dict], recomputed: bool, tmp_path: Path) -> None:
    assert_same(alone["lora"], result_of(Run("lora", "fsdp2", 2, compiled=True, recomputed=recomputed), tmp_path / "two"))


@pytest.mark.parametrize(
    "path",
    [
        [("fsdp2", 2), ("none", 1), ("fsdp2", 2)],
        [("none", 1), ("fsdp2", 2), ("ddp", 2)],
    ],
    ids=["2-1-2", "1-2-2"],
)
def test_a_run_goes_on_with_more_and_fewer_workers(alone: dict[str, dict], path: list[tuple[str, int]], tmp_path: Path) -> None:
    stops = zip(path, (2, 4, 6), strict=True)
    assert_same(alone["lora"], joined([Run("lora", mode, workers, stop=stop) for (mode, workers), stop in stops], tmp_path / "run"))


def test_a_part_that_is_missing_or_torn_is_refused(tmp_path: Path) -> None:
    result_of(Run("lora", "fsdp2", 2, stop=2), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    assert read_progress(folder)["step"] == 2
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-8])
    with pytest.raises(TrainingError, match="is torn"):
        read_progress(folder)
    shards[1].write_bytes(content)
    (folder / "part-1.json").unlink()
    with pytest.raises(TrainingError, match="is torn"):
        read_progress(folder)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(Run("lora"), tmp_path)
    write_checkpoint(tmp_path / "c", trainer.state(), {"step": 0})
    with pytest.raises(TrainingError, match="of another model or method"):
        read_tensors(tmp_path / "c", make_trainer(Run("prefix"), tmp_path).state())


def test_auto_shards_only_what_does_not_fit() -> None:
    gib = 2**30
    assert choose_placement("auto", 1, 10**9, 10**7, 2, 80 * gib).mode == "none"
    assert choose_placement("auto", 8, 10**9, 10**7, 2, 80 * gib).mode == "ddp"
    large = choose_placement("auto", 8, 70 * 10**9, 10**8, 2, 80 * gib)
    assert large.mode == "fsdp2" and "131.69 GiB" in large.reason and "52.00 GiB" in large.reason
    assert choose_placement("auto", 8, 7 * 10**9, 7 * 10**9, 2, 80 * gib).mode == "fsdp2"
    assert choose_placement("ddp", 8, 70 * 10**9, 10**8, 2, 80 * gib).mode == "ddp"
