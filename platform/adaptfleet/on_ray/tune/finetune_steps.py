"""What the task of a fine-tune's trial does: train, whole or up to a step, and say what came of it."""

import contextlib
import shutil
from pathlib import Path

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.core.checkpoint import read_progress
from adaptfleet.on_ray.compress.recipe_folder import made_once, write_json
from adaptfleet.on_ray.train.finetune import run_finetune
from adaptfleet.on_ray.train.run_folder import RunFolder, Segment
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder


def train(sweep: str, folder: str, name: str, job: FinetuneJob) -> int:
    """Trains, unless another trial has, and leaves `metrics.json` in the step's folder. Gives the tokens that were trained on."""
    kind, _, key = name.partition("-")
    run = RunFolder(home() / "runs" / job.run_name())

    def make(out: Path) -> None:
        run_finetune(job)
        evaluation = run.read_json("evaluation.json") or {}
        metrics = {key: float(value) for key, value in evaluation.items() if key != "step"}
        metrics["bytes"] = float(sum(file.stat().st_size for file in run.adapter.glob("*.safetensors")))
        write_json(out / "metrics.json", metrics)

    made_once(kind, key, make, SweepFolder(Path(folder)).steps)
    return int((run.read_json("facts.json") or {}).get("num_tokens", 0))


def train_segment(sweep: str, folder: str, name: str, job: FinetuneJob, until: int, before: str | None) -> int:
    """Trains up to a step, from the checkpoint of another segment, and leaves a checkpoint and `metrics.json` in the step's folder. Gives
    the tokens that were trained on."""
    kind, _, key = name.partition("-")
    steps = SweepFolder(Path(folder)).steps
    run = RunFolder.open(job)

    def make(out: Path) -> None:
        run.write_segment(Segment(until, str(steps / before / "checkpoint") if before else None))
        run_finetune(job)
        evaluation = run.read_json("evaluation.json") or {}
        metrics = {key: float(value) for key, value in evaluation.items() if key != "step"}
        if run.adapter.is_dir():
            metrics["bytes"] = float(sum(file.stat().st_size for file in run.adapter.glob("*.safetensors")))
        write_json(out / "metrics.json", metrics)
        shutil.copytree(_checkpoint(run, int(evaluation["step"])), out / "checkpoint")

    made_once(kind, key, make, steps)
    for checkpoint in run.path.glob("checkpoint_*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return _trained_tokens(run)


def _checkpoint(run: RunFolder, step: int) -> Path:
    for folder in run.path.glob("checkpoint_*"):
        with contextlib.suppress(TrainingError):  # an earlier one, cut off by a kill
            if read_progress(folder)["step"] == step:
                return folder
    raise TrainingError(f"the run {run.path} has left no checkpoint of step {step}. Remove the folder to train it again.")


def _trained_tokens(run: RunFolder) -> int:
    """Of the steps that the run made itself."""
    rows, plan = run.read_rows("train"), run.read_plan()
    made = {int(line["step"]) for line in run.metrics("train")}
    return sum(len(rows[i]) for step in made for pack in plan.steps[step - 1] for i in pack.indices)
