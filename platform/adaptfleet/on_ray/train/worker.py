"""What each worker of a fine-tuning run does."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointUploadMode
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.errors import AdaptfleetError, ContractError
from adaptfleet.contracts.jobs import FinetuneJob, stored_job
from adaptfleet.contracts.methods import QLora
from adaptfleet.core.checkpoint import read_progress, read_tensors, write_checkpoint
from adaptfleet.core.compilation import compile_layers, should_compile
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.evaluation.held_out import answer_scores, greedy_answers, held_out_loss, held_out_preferences
from adaptfleet.core.export import export_model
from adaptfleet.core.kernels import fuse_kernels
from adaptfleet.core.loop import Trainer, rows_per_pass
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.methods.qlora import keep_as_quantized, quantization_config
from adaptfleet.core.models.device import device, memory_per_worker, model_dtype
from adaptfleet.core.models.loading import load_base
from adaptfleet.core.objectives import Objective, Preference, objective
from adaptfleet.core.packed_forward import PackedBatch, check_packable
from adaptfleet.core.recomputation import recompute_layers, should_recompute
from adaptfleet.core.sharding import choose_placement, shard, worker_mesh
from adaptfleet.on_ray.distill.teacher import captures_layers, distillation, end_ids, load_teacher, piece_distillation
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.on_ray.train.failures import leave
from adaptfleet.on_ray.train.metrics_log import MetricsLog
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.train.samples import write_after, write_before
from adaptfleet.on_ray.train.tracking import open_trackers


def train(config: dict[str, Any]) -> None:
    """Runs on each worker. An error of contract or data ends the run; any other is a fault, which Ray Train answers by a restart."""
    folder = RunFolder(Path(config["folder"]))
    if folder.read_json("failure.json") is not None:
        return
    try:
        _FinetuneWorker(stored_job(config["job"]), folder, config["num_cpus"]).run()
    except AdaptfleetError as error:
        # Every worker raises it alike. A raised one would be tried again, to the same end.
        if ray.train.get_context().get_world_rank() == 0:
            folder.write_json("failure.json", {"kind": type(error).__name__, "message": str(error)})


class _FinetuneWorker:
    def __init__(self, job: FinetuneJob, folder: RunFolder, num_cpus: int) -> None:
        context = ray.train.get_context()
        # Pods of a dev cluster promise one machine's cores several times over, and threads without a core of theirs cost a multiple.
        torch.set_num_threads(max(1, min(num_cpus, (os.cpu_count() or 1) // context.get_local_world_size())))
        self.job = job
        self.folder = folder
        self.facts = folder.read_json("facts.json") or {}
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.is_first = self.rank == 0
        self.rows = folder.read_rows("train")
        self.test_rows = folder.read_rows("test")[: job.evaluation.max_loss_rows]
        answerable = folder.read_examples()
        self.examples = answerable[: job.evaluation.max_generated_rows]
        self.sample_rows = answerable[: job.evaluation.max_sample_rows]
        self.answers: list[str] = []
        self.plan = folder.read_plan()
        self.segment = folder.read_segment()
        self.settings = ""
        self.until = min(self.segment.until, len(self.plan.steps)) if self.segment else len(self.plan.steps)
        # A base that may be sharded need not fit the device whole: its layers come there one by one.
        self.loads_on = torch.device("cpu") if self.num_workers > 1 and job.cluster.shard != "ddp" else device()
        self.model = self._adapted(check=True)
        self.teacher = self._teacher()
        compiled, self.compile_reason = should_compile(job.train.compile, self.plan.num_tokens)
        self.compiled = compiled and self.adaptation.compilable and not captures_layers(job.objective)
        whole = [self.model] if self.teacher is None else [self.model, self.teacher]
        if self.compiled:
            for model in whole:
                compile_layers(model)
        parameters = [p for model in whole for p in model.parameters()]
        memory = memory_per_worker(context.get_local_world_size())
        self.placement = choose_placement(
            job.cluster.shard,
            self.num_workers,
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            self.model.dtype.itemsize,
            memory,
            job.cluster.tensor_parallel,
        )
        num_rows = min(rows_per_pass(job.train.pack_tokens), -(-job.train.num_packs // (self.num_workers // job.cluster.tensor_parallel)))
        recomputes, reason = should_recompute(
            job.train.gradient_checkpointing, self.model, num_rows * job.train.pack_tokens, self.placement.resident_bytes, memory
        )
        self.recompute_reason = f"gradient checkpointing {'on' if recomputes else 'off'}: {reason}"
        if recomputes:
            recompute_layers(self.model)
        self.is_sharded = self.placement.mode == "fsdp2"
        if self.is_sharded and not self.adaptation.shardable:
            raise ContractError(
                f"method.kind {job.method.kind!r} cannot be sharded with fsdp2 ({self.placement.reason}); "
                "use cluster.shard=ddp with larger workers, or lora."
            )
        mesh = worker_mesh(device().type, self.num_workers, job.cluster.tensor_parallel) if self.is_sharded else None
        self.call = shard(self.model, mesh) if mesh else self._call
        if not mesh and self.loads_on != device():
            torch.nn.Module.to(self.model, device())
        self.objective = self._objective(mesh)
        pad_id = self.tokenizer.pad_token_id
        self.trainer = Trainer(self.model, self.adaptation, job.train, self.plan, self.rows, pad_id, self.objective, self.call, mesh)

    def _call(self, function: Callable[[AdaptedModel, PackedBatch], Any], batch: PackedBatch) -> Any:
        return function(self.model, batch)

    def _teacher(self) -> PreTrainedModel | None:
        """Beside the student in this worker, where the run has one."""
        spec = self.job.objective
        if not isinstance(spec, Distillation) or spec.source.kind == "offline":
            return None
        teacher = load_teacher(spec, self.facts["teacher"]["folder"])
        rows = self._teachers_rows() or self.rows
        embedding: Any = teacher.get_input_embeddings()
        check_packable(teacher, min(len(self.tokenizer), embedding.num_embeddings), self.job.train.pack_tokens, int(rows.lengths.max()))
        return teacher

    def _teachers_rows(self) -> Rows | None:
        """In a teacher's own tokens, where it has another tokenizer."""
        spec = self.job.objective
        by_piece = isinstance(spec, Distillation) and spec.unit == "piece"
        return self.folder.read_rows("train", "teacher_files") if by_piece else None

    def _objective(self, mesh: DeviceMesh | None) -> Objective:
        spec = self.job.objective
        if not isinstance(spec, Distillation):
            return objective(spec)
        teachers = self._teachers_rows()
        if teachers is not None:
            assert self.teacher is not None
            return piece_distillation(self.job, self.tokenizer, self.teacher, self.rows, teachers, mesh, self.facts["teacher"]["folder"])
        ends = end_ids(self.model, self.tokenizer)
        return distillation(self.job, self.facts["teacher"], self.model, self.teacher, self.rows, mesh, ends)

    def _adapted(self, check: bool = False) -> AdaptedModel:
        method = self.job.method
        quantized = quantization_config(method, model_dtype(self.job.model)) if isinstance(method, QLora) else None
        base, self.tokenizer, _ = load_base(at_hand(self.job.model), quantization=quantized, on=self.loads_on)
        fuse_kernels(base)
        if quantized:
            keep_as_quantized(base)
        if check:
            longest = int(max(self.rows.lengths.max(), self.test_rows.lengths.max())) + getattr(method, "num_virtual_tokens", 0)
            check_packable(base, len(self.tokenizer), self.job.train.pack_tokens, longest)
        self.adaptation = adaptation(method, self.tokenizer)
        return self.adaptation.attach(base, self.job.train.seed)

    def run(self) -> None:
        num_steps = len(self.plan.steps)
        resumed = self._resume()
        if not resumed and (self.is_first or self.is_sharded):
            self._say(phase="answering samples before training,")
            before = self._answer(self.sample_rows)
            if self.is_first:
                write_before(self.folder, self.sample_rows, before)
        log = None
        if self.is_first:
            trackers = open_trackers(self.job, self.folder.path, self.trainer.step)
            log = MetricsLog(self.folder.path, self.trainer.step, trackers)
            cost = {"redone": log.num_redone, "stopped_at": log.stopped_at, "at": time.time()}
            log.write("start", self.trainer.step, {"num_workers": self.num_workers, **cost})
        evaluated = {round(num_steps * (i + 1) / self.job.evaluation.times) for i in range(self.job.evaluation.times)} | {self.until}
        reason = f"{self.compile_reason}; {self.placement.mode}: {self.placement.reason}; {self.recompute_reason}"
        self.settings = f"layers {'compiled' if self.compiled else 'not compiled'}: {reason}"
        self._say(phase="training")
        num_tokens, seconds, began = 0, 0.0, time.perf_counter()
        for result in self.trainer.run(self.until):
            num_tokens += result.num_tokens
            seconds += time.perf_counter() - began
            speed = num_tokens / seconds
            if log:
                values = {"loss": result.loss, "learning_rate": result.learning_rate, "grad_norm": result.grad_norm, "tokens_per_s": speed}
                log.write("train", result.step, {**values, "num_workers": self.num_workers, "at": time.time()})
            self._say(
                phase="training",
                loss=result.loss,
                tokens_per_s=speed,
                seconds_left=(num_steps - result.step) * seconds / num_tokens * result.num_tokens,
            )
            metrics: dict[str, float] = {"step": result.step, "train_loss": result.loss, "train_tokens_per_s": speed}
            if result.step in evaluated and (log or self.is_sharded):
                metrics |= self._evaluate(log)
                self.model.train()
            self._save(metrics, is_last=result.step == self.until)
            began = time.perf_counter()
        if self.until == num_steps:
            self._finish()
        if log:
            log.close()

    def _resume(self) -> bool:
        """Takes up the last checkpoint, or the one that the run's segment begins with; False: there is none."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self.segment and self.segment.checkpoint:
            checkpoint = ray.train.Checkpoint.from_directory(self.segment.checkpoint)
        if checkpoint is None:
            return False
        with checkpoint.as_directory() as path:
            progress = read_progress(Path(path))
            self.trainer.load_state(read_tensors(Path(path), self.trainer.state()), progress["step"])
        return True

    def _evaluate(self, log: MetricsLog | None) -> dict[str, float]:
        """The held-out metrics. The first worker alone finds them while the others wait for its next gradient; where the model is sharded
        all take part."""
        self._say(phase="evaluating")
        with torch.compiler.set_stance("force_eager"):
            values = self._held_out()
        if self.examples:
            self.answers = self._answer(self.examples)
            values |= answer_scores(self.answers, self.examples).metrics()
        if log:
            log.write("evaluation", self.trainer.step, values)
            self.folder.write_json("evaluation.json", {"step": self.trainer.step, **values})
        return values

    def _held_out(self) -> dict[str, float]:
        sizes = self.plan.pack_tokens, self.tokenizer.pad_token_id
        if isinstance(self.objective, Preference):
            return held_out_preferences(self.model, self.objective, self.test_rows, *sizes, self.call)
        loss = held_out_loss(self.model, self.test_rows, *sizes, self.call)
        return {"eval_loss": loss.loss, "eval_perplexity": loss.perplexity}

    def _answer(self, examples: list[Example]) -> list[str]:
        def tell(done: int) -> None:
            self._say(phase=f"answering held-out rows, {done}/{len(examples)}")

        # answers grow token by token, and compiled layers would be compiled anew for each length
        with torch.compiler.set_stance("force_eager"):
            return greedy_answers(self.model, self.tokenizer, examples, self.job.evaluation.max_new_tokens, tell)

    def _save(self, metrics: dict[str, float], is_last: bool) -> None:
        """A checkpoint when one is due, written while training goes on; at a preemption notice one that is waited for, and the end."""
        preempted = ray.train.get_preemption_info() is not None and not is_last
        due = is_last or preempted or self.trainer.step % self.job.checkpoint.every_steps == 0
        if not due:
            return
        checkpoint = None
        state = self.trainer.state() if self.is_first or self.is_sharded else {}
        if state:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
            write_checkpoint(folder, state, {"step": self.trainer.step, "metrics": metrics}, self.rank)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        waits = is_last or preempted
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if waits else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if preempted:
            self._say(phase="leaving a preempted node, all saved,")
            leave(self.trainer.step)

    def _finish(self) -> None:
        """The trained part on disk, and the merged model where that is what will be published."""
        if self.is_first or self.is_sharded:
            # The samples are the first of the rows that the last evaluation has answered.
            known = self.answers[: len(self.sample_rows)]
            after = known + self._answer(self.sample_rows[len(known) :])
            if self.is_first:
                write_after(self.folder, after)
        self._say(phase="exporting")
        trained = self.trainer.optimizer.whole_weights() if self.is_sharded else {}
        if not self.is_first:
            return
        model = self.model
        if self.is_sharded:
            first = self.adaptation
            model = self._adapted()
            self.adaptation.load_state(first.state())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in trained:
                        parameter.copy_(trained[name])
        self._write(self.folder.adapter, lambda folder: self.adaptation.export(model.eval(), folder, self.facts["base"]))
        if self.job.publish and self.job.published_as() == "model":
            self._write(self.folder.model, lambda folder: export_model(self.adaptation.merged(model), self.tokenizer, folder))

    def _write(self, target: Path, export: Callable[[Path], None]) -> None:
        unfinished = target.with_name(f".{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        export(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)

    def _say(self, **values: Any) -> None:
        if self.is_first:
            place = {"step": self.trainer.step, "num_steps": len(self.plan.steps), "pid": os.getpid(), "cpu_s": time.process_time()}
            self.folder.write_json("progress.json", {**place, "settings": self.settings, **values})
