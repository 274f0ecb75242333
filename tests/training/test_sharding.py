"""Several workers in real processes over gloo: the losses of one, sharded or not, and checkpoints that any number of workers takes up."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import AdaLora, Full, Lora, Method, PrefixTuning
from adaptfleet.core.checkpoint import read_progress, read_tensors, write_checkpoint
from adaptfleet.core.compilation import compile_layers
from adaptfleet.core.evaluation.held_out import held_out_loss
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.sharding import choose_placement, shard
from adaptfleet.core.steps import plan_steps
from tests.training.test_methods import make_model, rows

METHODS: dict[str, Method] = {
    "lora": Lora(rank=4, alpha=8, dropout=0.0),
    "full": Full(),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "adalora": AdaLora(rank=2, initial_rank=4, every_steps=2),
}
STEPS = 6
LIMIT_S = 120


def make_trainer(method: str, mode: str, num_workers: int, compiled: bool = False) -> Trainer:
    # three packs a step: two workers cannot share them evenly
    train = TrainSpec(epochs=9, max_steps=STEPS, pack_tokens=64, packs_per_step=3, learning_rate=0.01)
    adapted = adaptation(METHODS[method])
    model = adapted.attach(make_model("llama"), 0)
    if compiled:
        compile_layers(model)
    call = shard(model, num_workers) if mode == "fsdp2" else None
    data = rows()
    return Trainer(model, adapted, train, plan_steps(data, train), data, 0, call=call)


def work(rank: int, num_workers: int, folder: Path, method: str, mode: str, stop: int, compiled: bool) -> None:
    """One worker: goes on from the folder's checkpoint if there is one, stops after `stop` steps and writes one."""
    torch.set_num_threads(1)
    if num_workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{stop}", rank=rank, world_size=num_workers)
    trainer = make_trainer(method, mode, num_workers, compiled)
    checkpoints = sorted(folder.glob("checkpoint-*"))
    if checkpoints:
        progress = read_progress(checkpoints[-1])
        trainer.load_state(read_tensors(checkpoints[-1], trainer.state()), progress["step"])
    losses = []
    for result in trainer.run():
        losses.append(result.loss)
        if result.step == stop:
            break
    held_out = held_out_loss(trainer.model, rows(6), 64, 0, trainer.call).loss
    state = trainer.state()
    if rank == 0 or mode == "fsdp2":
        write_checkpoint(folder / f"checkpoint-{stop}", state, {"step": stop}, rank)
    total = sum(float(weight.double().abs().sum()) for weight in trainer.optimizer.whole_weights().values())
    if rank == 0:
        (folder / f"result-{stop}.json").write_text(json.dumps({"losses": losses, "held_out": held_out, "sum": total}))
    if num_workers > 1:
        dist.destroy_process_group()


def run(folder: Path, method: str, mode: str, num_workers: int, stop: int = STEPS, compiled: bool = False) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    arguments = (num_workers, folder, method, mode, stop, compiled)
    if num_workers == 1:
        work(0, *arguments)
    else:
        processes = mp.spawn(work, args=arguments, nprocs=num_workers, join=False)
        end = time.monotonic() + LIMIT_S
        while not processes.join(timeout=1):
            if time.monotonic() > end:
                for process in processes.processes:
                    process.kill()
                raise AssertionError(f"{num_workers} workers did not end within {LIMIT_S} s")
    return json.loads((folder / f"result-{stop}.json").read_text())


def assert_same(one: dict, other: dict) -> None:
    # sums in another order; AdamW divides by their size, so the difference grows a little with each step
    assert other["losses"] == pytest.approx(one["losses"], rel=2e-3)
    assert other["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
    assert other["held_out"] == pytest.approx(one["held_out"], rel=2e-3)
    assert other["sum"] == pytest.approx(one["sum"], rel=2e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: run(folder / method, method, "none", 1) for method in METHODS}


@pytest.mark.parametrize(("method", "mode"), [(m, "fsdp2") for m in ("lora", "full", "prefix")] + [(m, "ddp") for m in ("lora", "adalora")])
def test_two_workers_have_the_losses_of_one(alone: dict[str, dict], method: str, mode: str, tmp_path: Path) -> None:
    assert_same(alone[method], run(tmp_path / "two", method, mode, 2))


def test_sharded_layers_can_be_compiled(alone: dict[str, dict], tmp_path: Path) -> None:
    assert_same(alone["lora"], run(tmp_path / "two", "lora", "fsdp2", 2, compiled=True))


@pytest.mark.parametrize(
    "path",
    [
        [("fsdp2", 2), ("none", 1), ("fsdp2", 2)],
        [("none", 1), ("fsdp2", 2), ("ddp", 2)],
    ],
    ids=["2-1-2", "1-2-2"],
)
def test_a_run_goes_on_with_more_and_fewer_workers(alone: dict[str, dict], path: list[tuple[str, int]], tmp_path: Path) -> None:
    parts = [run(tmp_path / "run", "lora", mode, workers, stop) for (mode, workers), stop in zip(path, (2, 4, 6), strict=True)]
    assert_same(alone["lora"], {**parts[-1], "losses": [loss for part in parts for loss in part["losses"]]})


def test_a_part_that_is_missing_or_torn_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", "lora", "fsdp2", 2, 2)
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
    trainer = make_trainer("lora", "none", 1)
    write_checkpoint(tmp_path / "c", trainer.state(), {"step": 0})
    with pytest.raises(TrainingError, match="of another model or method"):
        read_tensors(tmp_path / "c", make_trainer("prefix", "none", 1).state())


def test_auto_shards_only_what_does_not_fit() -> None:
    gib = 2**30
    assert choose_placement("auto", 1, 10**9, 10**7, 2, 80 * gib).mode == "none"
    assert choose_placement("auto", 8, 10**9, 10**7, 2, 80 * gib).mode == "ddp"
    large = choose_placement("auto", 8, 70 * 10**9, 10**8, 2, 80 * gib)
    assert large.mode == "fsdp2" and "131.69 GiB" in large.reason and "52.00 GiB" in large.reason
    assert choose_placement("auto", 8, 7 * 10**9, 7 * 10**9, 2, 80 * gib).mode == "fsdp2"
    assert choose_placement("ddp", 8, 70 * 10**9, 10**8, 2, 80 * gib).mode == "ddp"
