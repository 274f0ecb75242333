"""The same training on a GPU: `make test-gpu`. Losses are held against the CPU's."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.import_utils import is_liger_kernel_available

from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import Lora
from adaptfleet.core.compilation import compile_layers
from adaptfleet.core.kernels import fuse_kernels
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.lora import LoraAdaptation
from adaptfleet.core.segment_attention import use_segment_attention
from adaptfleet.core.steps import plan_steps
from tests.training.conftest import make_model
from tests.training.test_finetune_job import Job, command, run_folder, write
from tests.training.test_finetune_job import contract as contract  # a fixture
from tests.training.test_loop import rows

pytestmark = pytest.mark.gpu


def curve(device: str, dtype: torch.dtype = torch.float32, compiled: bool = False, fused: bool = False) -> list[float]:
    train = TrainSpec(max_steps=6, pack_tokens=64, packs_per_step=3, learning_rate=0.01)
    base = make_model("llama").to(device=device, dtype=dtype)
    use_segment_attention(base)
    if fused:
        assert fuse_kernels(base) == is_liger_kernel_available()
    adaptation = LoraAdaptation(Lora(rank=4, dropout=0.0))
    model = adaptation.attach(base, 0)
    if compiled:
        compile_layers(model)
    return [r.loss for r in Trainer(model, adaptation, train, plan_steps(rows(), train), rows(), pad_id=0).run()]


def test_a_gpu_has_the_losses_of_a_cpu() -> None:
    # float32 products of a GPU may be rounded to TF32, and AdamW divides by the gradients' size
    assert curve("cuda") == pytest.approx(curve("cpu"), rel=1e-3)


@pytest.mark.parametrize(("compiled", "fused"), [(False, False), (True, False), (False, True), (True, True)])
def test_bfloat16_compiled_and_fused_layers_follow_it(compiled: bool, fused: bool) -> None:
    # bfloat16 has 8 bits of mantissa, and the tiny model's large weights do not average its rounding out
    assert curve("cuda", torch.bfloat16, compiled, fused) == pytest.approx(curve("cpu"), rel=5e-2)


def test_a_job_takes_every_gpu_with_nccl(local_cluster: Any, contract: Callable[..., Job], tmp_path: Path) -> None:
    workers = torch.cuda.device_count()
    job = contract(
        "on-gpus",
        cluster={"workers": workers, "gpus_per_worker": 1, "shard": "fsdp2" if workers > 1 else "auto"},
        train={"packs_per_step": 2 * workers, "max_steps": 20},
    )
    done = subprocess.run(command(write(job, tmp_path)), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    made = [json.loads(line) for line in (run_folder(job) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in made if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
