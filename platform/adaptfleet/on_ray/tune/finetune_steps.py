"""What the task of a fine-tune's trial does: train, and say what came of it."""

from pathlib import Path

from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.on_ray.compress.recipe_folder import made_once, write_json
from adaptfleet.on_ray.train.finetune import run_finetune
from adaptfleet.on_ray.train.run_folder import RunFolder
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
