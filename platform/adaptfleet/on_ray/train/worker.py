"""What each worker of a fine-tuning run does."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.core.checkpoint import read_checkpoint, write_checkpoint
from adaptfleet.core.compilation import compile_layers, should_compile
from adaptfleet.core.evaluation.held_out import answer_scores, greedy_answers, held_out_loss
from adaptfleet.core.export import export_adapter
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.lora import attach_lora
from adaptfleet.core.models.loading import load_base
from adaptfleet.core.packed_forward import check_packable
from adaptfleet.on_ray.train.metrics_log import MetricsLog
from adaptfleet.on_ray.train.run_folder import RunFolder


def train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker. An error of contract or data ends the run; any other is a fault, which Ray Train answers by a restart."""
    folder = RunFolder(Path(config["folder"]))
    try:
        _FinetuneWorker(FinetuneJob.model_validate_json(config["job"], strict=False), folder, config["num_cpus"]).run()
    except AdaptfleetError as error:
        # Every worker raises it alike. A raised one would be tried again, to the same end.
        if ray.train.get_context().get_world_rank() == 0:
            folder.write_json("failure.json", {"kind": type(error).__name__, "message": str(error)})


class _FinetuneWorker:
    def __init__(self, job: FinetuneJob, folder: RunFolder, num_cpus: int) -> None:
        torch.set_num_threads(min(num_cpus, os.cpu_count() or 1))
        self.job = job
        self.folder = folder
        self.facts = folder.read_json("facts.json") or {}
        self.is_first = ray.train.get_context().get_world_rank() == 0
        self.rows = folder.read_rows("train")
        self.test_rows = folder.read_rows("test")[: job.evaluation.max_loss_rows]
        self.examples = folder.read_examples()
        self.plan = folder.read_plan()
        base, self.tokenizer, _ = load_base(job.model)
        longest = int(max(self.rows.lengths.max(), self.test_rows.lengths.max()))
        check_packable(base, len(self.tokenizer), job.train.pack_tokens, longest)
        self.model = attach_lora(base, job.method, job.train.seed)
        self.trainer = Trainer(self.model, job.train, self.plan, self.rows, self.tokenizer.pad_token_id)

    def run(self) -> None:
        num_steps = len(self.plan.steps)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as path:
                state, progress = read_checkpoint(Path(path))
            self.trainer.optimizer.load_state(state)
            self.trainer.step = progress["step"]
        compiled, reason = should_compile(self.job.train.compile, self.plan.num_tokens)
        if compiled:
            compile_layers(self.model)
        log = MetricsLog(self.folder.path, self.trainer.step) if self.is_first else None
        evaluated = {round(num_steps * (i + 1) / self.job.evaluation.times) for i in range(self.job.evaluation.times)}
        self._say(phase="training", compiled=compiled, compile_reason=reason)
        num_tokens, seconds, began = 0, 0.0, time.perf_counter()
        for result in self.trainer.run():
            num_tokens += result.num_tokens
            seconds += time.perf_counter() - began
            speed = num_tokens / seconds
            if log:
                values = {"loss": result.loss, "learning_rate": result.learning_rate, "grad_norm": result.grad_norm, "tokens_per_s": speed}
                log.write("train", result.step, values)
            self._say(
                phase="training",
                loss=result.loss,
                tokens_per_s=speed,
                seconds_left=(num_steps - result.step) * seconds / num_tokens * result.num_tokens,
            )
            metrics: dict[str, float] = {"step": result.step, "train_loss": result.loss, "train_tokens_per_s": speed}
            if result.step in evaluated and log:
                metrics |= self._evaluate(log)
                self.model.train()
            self._report(metrics, result.step == num_steps)
            began = time.perf_counter()
        if log:
            self._finish()
            log.close()

    def _evaluate(self, log: MetricsLog) -> dict[str, float]:
        """The held-out metrics, on the first worker alone: the others wait for its next gradient."""
        step = self.trainer.step
        self._say(phase="evaluating")
        loss = held_out_loss(self.model, self.test_rows, self.plan.pack_tokens, self.tokenizer.pad_token_id)
        values = {"eval_loss": loss.loss, "eval_perplexity": loss.perplexity}
        if self.examples:
            answers = greedy_answers(
                self.model,
                self.tokenizer,
                self.examples,
                self.job.evaluation.max_new_tokens,
                lambda done: self._say(phase=f"answering held-out rows, {done}/{len(self.examples)}"),
            )
            values |= answer_scores(answers, self.examples).metrics()
        log.write("evaluation", step, values)
        self.folder.write_json("evaluation.json", {"step": step, **values})
        return values

    def _report(self, metrics: dict[str, float], is_last: bool) -> None:
        """A checkpoint when one is due. Every worker reports, the first one alone writes: all hold the same state."""
        if not is_last and self.trainer.step % self.job.checkpoint.every_steps:
            return
        if not self.is_first:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as path:
            write_checkpoint(Path(path), self.trainer.optimizer.state(), {"step": self.trainer.step, "metrics": metrics})
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(path))

    def _finish(self) -> None:
        self._say(phase="exporting")
        unfinished = self.folder.path / ".adapter"
        shutil.rmtree(unfinished, ignore_errors=True)
        export_adapter(self.model, unfinished, self.facts["base"])
        shutil.rmtree(self.folder.adapter, ignore_errors=True)
        unfinished.rename(self.folder.adapter)

    def _say(self, **values: Any) -> None:
        if self.is_first:
            place = {"step": self.trainer.step, "num_steps": len(self.plan.steps), "pid": os.getpid()}
            self.folder.write_json("progress.json", {**place, **values})
