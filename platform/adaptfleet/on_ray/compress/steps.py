"""What each step of a recipe makes of a checkpoint's folder."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from adaptfleet.contracts.compression import CompressJob, Prune, Quantize, Recover, Tune
from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import EvaluationSpec, FinetuneJob
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.schemes import Mixed
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.teachers import OnlineTeacher
from adaptfleet.core.export import export_model
from adaptfleet.core.loop import StepResult
from adaptfleet.core.models.device import model_dtype
from adaptfleet.core.models.loading import base_revision, load_base
from adaptfleet.core.pruning.importance import Importance, measure
from adaptfleet.core.pruning.refit import refit
from adaptfleet.core.pruning.slicing import choose, sliced
from adaptfleet.core.quantization.calibration import rows_sha256
from adaptfleet.core.quantization.rotation import rotate
from adaptfleet.core.quantization.rounding import quantize
from adaptfleet.core.quantization.tuning import tune, write_tuned
from adaptfleet.on_ray.compress.preflight import Prepared, recovery_data

log = logging.getLogger(__name__)


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The type that the weights are stored in; float32 is what a config without one means."""
    dtype = AutoConfig.from_pretrained(folder).dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def load_stored(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint in its own type."""
    model, tokenizer, _ = load_base(ModelSpec(source=str(folder)), dtype=checkpoint_dtype(folder))
    return model, tokenizer


def importance(folder: Path, rows: list[Encoded]) -> Importance:
    """Measured once for a model and its rows, then kept."""
    file = home() / "cache" / "importance" / f"{base_revision(folder)[:16]}-{rows_sha256(rows)[:16]}.safetensors"
    if file.is_file():
        log.info("importance: as measured before (%s)", file.name)
        return Importance.load(file)
    model, tokenizer, _ = load_base(ModelSpec(source=str(folder)), dtype=model_dtype(ModelSpec()))

    def tell(done: int, total: int) -> None:
        if done == total or done % max(1, total // 5) == 0:
            log.info("importance: %d of %d packed rows", done, total)

    found = measure(model, rows, int(tokenizer.pad_token_id or 0), tell)
    file.parent.mkdir(parents=True, exist_ok=True)
    found.save(file)
    return found


def prune(folder: Path, out: Path, step: Prune, rows: list[Encoded]) -> None:
    scores = importance(folder, rows)
    model, tokenizer = load_stored(folder)
    kept = choose(model.config, step, scores)
    if step.refit:
        refit(model, kept, rows, int(tokenizer.pad_token_id or 0))
    smaller = sliced(model, kept)
    sizes = [f"{sum(p.numel() for p in m.parameters()):,}" for m in (model, smaller)]
    log.info("prune: %s parameters of %s stay", sizes[1], sizes[0])
    export_model(smaller, tokenizer, out)


def recovery_job(job: CompressJob, step: Recover, folder: Path, key: str) -> FinetuneJob:
    """The recovery as a fine-tune of the pruned checkpoint. Whatever objective the fine-tuning job has can heal: `step.objective` is
    handed on as it is, distillation's among them."""
    return FinetuneJob(
        run=f"recover-{key}",
        model=ModelSpec(source=str(folder), dtype=job.model.dtype, trust_remote_code=job.model.trust_remote_code),
        data=recovery_data(job, step),
        method=step.method,
        objective=step.objective,
        train=step.train,
        evaluation=EvaluationSpec(max_generated_rows=0, max_sample_rows=0),
        cluster=step.cluster,
        publish=None,
    )


def recover(out: Path, finetune: FinetuneJob) -> None:
    """Trains on Ray Train; killed and started again it goes on from its last checkpoint."""
    from adaptfleet.on_ray.train.finetune import run_finetune

    shutil.copytree(run_finetune(finetune), out, dirs_exist_ok=True)


@torch.no_grad()
def merge(folder: Path, adapter: Path, out: Path) -> None:
    """Adds the adapter in float32 and rounds once, to the checkpoint's own type."""
    from adaptfleet.on_ray.evaluate.local_models import load_adapter

    base, tokenizer, _ = load_base(ModelSpec(source=str(folder)), dtype=torch.float32)
    merged = load_adapter(base, adapter).merge_and_unload()  # type: ignore[operator]
    export_model(merged.to(checkpoint_dtype(folder)), tokenizer, out)


def round_weights(folder: Path, out: Path, step: Quantize, prepared: Prepared) -> None:
    # llm-compressor makes the folder itself
    out.rmdir()
    if not step.rotate:
        _round(folder, out, step, prepared, untie=step.head != "keep" and prepared.shapes.is_tied)
        return
    # by its name and this process's number it is found and removed after a kill, as the step's own folder is
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=f".{os.getpid()}", dir=out.parent) as scratch:
        model, tokenizer, _ = load_base(ModelSpec(source=str(folder)), dtype=torch.float32)
        rotate(model)
        torch.nn.Module.to(model, checkpoint_dtype(folder))
        export_model(model, tokenizer, Path(scratch))
        _round(Path(scratch), out, step, prepared, untie=False)


def _round(folder: Path, out: Path, step: Quantize, prepared: Prepared, untie: bool) -> None:
    bits_of = None
    if isinstance(step.scheme, Mixed):
        from adaptfleet.on_ray.compress.mixing import choose_bits

        bits_of = choose_bits(folder, step, prepared)
    quantize(folder, out, step, prepared.calibration, bits_of, untie)


def tune_scales(folder: Path, out: Path, step: Tune, prepared: Prepared) -> None:
    """The rounded checkpoint with scales that learnt from the recipe's parent."""
    dtype = model_dtype(ModelSpec())
    student, tokenizer, _ = load_base(ModelSpec(source=str(folder)), dtype=dtype)
    parent, _, _ = load_base(ModelSpec(source=str(prepared.folder)), dtype=dtype)
    spec = Distillation(teacher=ModelSpec(source=str(prepared.folder)), alpha=1.0)

    def objective(model: PreTrainedModel) -> KnowledgeDistillation:
        return KnowledgeDistillation(spec, OnlineTeacher(parent, spec, model.config.vocab_size), model)

    def tell(result: StepResult, total: int) -> None:
        if result.step == total or result.step % max(1, total // 10) == 0:
            log.info("tune: step %d of %d, %.4f nats from the parent", result.step, total, result.loss)

    scales = tune(student, folder, step.train, prepared.tuning, int(tokenizer.pad_token_id or 0), objective, tell)
    write_tuned(folder, out, scales)
