"""Training, measured against TRL's SFTTrainer on the same model, data, seed, rank and cores.

    python bench/train.py [--steps 20] [--only ours trl_best trl_default]

Each contender is a process of its own and trains LoRA r16 on all linear modules of the embedded model, on `address-json`:

ours         this platform's loop: packed rows of 1,024 tokens, bfloat16, layers compiled
trl_best     SFTTrainer at the best settings known: bfloat16 weights, packing, no gradient checkpointing
trl_default  SFTTrainer as it comes: float32 weights, autocast, padding, gradient checkpointing, 8 rows a step

tokens_per_s leaves out the first three steps (compiling, caches). peak_rss_mb is the process's own. held_out_loss is measured by the same
code on the same rows, of the adapter that each saved. TRL comes into an environment beside .venv, build/peers, which sees .venv's packages.
Results: bench/results/train.json.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "train.json"
PEERS = REPOSITORY / "build" / "peers"
TRL = "1.16.0"
RANK, ALPHA, LEARNING_RATE, PACK_TOKENS, SEED = 16, 32, 1e-3, 1024, 0
WARM_STEPS = 3
CONTENDERS = ("ours", "trl_best", "trl_default")


class Clock:
    """Tokens a second of the steps after the first few."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def tick(self, num_tokens: int) -> None:
        self.steps.append((time.perf_counter(), num_tokens))

    def tokens_per_s(self) -> float:
        begin = self.steps[WARM_STEPS - 1][0]
        return sum(tokens for _, tokens in self.steps[WARM_STEPS:]) / (self.steps[-1][0] - begin)


def run_ours(steps: int, folder: Path) -> dict[str, Any]:
    import torch

    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.jobs import TrainSpec
    from adaptfleet.contracts.methods import Lora
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.compilation import compile_layers
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.loop import Trainer
    from adaptfleet.core.methods.choice import adaptation
    from adaptfleet.core.models.loading import load_base
    from adaptfleet.core.steps import plan_steps

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    base, tokenizer, _ = load_base(ModelSpec())
    rows = encode_all(load_dataset(DataSpec()).train, tokenizer, PACK_TOKENS)
    train = TrainSpec(epochs=9, max_steps=steps, pack_tokens=PACK_TOKENS, learning_rate=LEARNING_RATE, seed=SEED)
    method = adaptation(Lora(rank=RANK, alpha=ALPHA))
    model = method.attach(base, SEED)
    compile_layers(model)
    trainer = Trainer(model, method, train, plan_steps(rows, train), rows, tokenizer.pad_token_id)
    clock, losses = Clock(), []
    for result in trainer.run():
        clock.tick(result.num_tokens)
        losses.append(result.loss)
    method.export(model, folder, "smollm2-135m")
    return {"tokens_per_s": clock.tokens_per_s(), "losses": losses, "num_tokens": sum(tokens for _, tokens in clock.steps)}


def run_trl(steps: int, folder: Path, best: bool) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.models.loading import resolve_model_folder

    trl: Any = importlib.import_module("trl")  # of the peers' environment, not of ours
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = resolve_model_folder(ModelSpec())
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [
        [{"role": message.role, "content": message.content} for message in example.messages] for example in load_dataset(DataSpec()).train
    ]
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    dtype = torch.bfloat16 if best else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    common = {
        "output_dir": str(folder / "trainer"), "max_steps": steps, "learning_rate": LEARNING_RATE, "seed": SEED, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True,
    }  # fmt: skip
    own = {"packing": True, "max_length": PACK_TOKENS, "per_device_train_batch_size": 1, "gradient_checkpointing": False, "bf16": True}
    settings = trl.SFTConfig(**common, **(own if best else {}))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    clock, losses = Clock(), []

    class Follow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.tick(0)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class Counting(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            self.seen = [
                *getattr(self, "seen", []),
                int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel(),
            ]
            return super().training_step(model, inputs, *rest)

    trainer = Counting(model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Follow()])
    trainer.train()
    per_step = len(trainer.seen) // len(clock.steps)
    clock.steps = [(at, sum(trainer.seen[i * per_step : (i + 1) * per_step])) for i, (at, _) in enumerate(clock.steps)]
    trainer.model.save_pretrained(str(folder), safe_serialization=True)
    shown = {
        name: str(getattr(settings, name))
        for name in ("bf16", "packing", "padding_free", "gradient_checkpointing", "per_device_train_batch_size")
    }
    return {
        "tokens_per_s": clock.tokens_per_s(), "losses": losses, "num_tokens": sum(tokens for _, tokens in clock.steps),
        "settings": {**shown, "weights": str(next(p for p in trainer.model.parameters() if not p.requires_grad).dtype)},
    }  # fmt: skip


def held_out(folder: Path) -> float:
    """Mean cross-entropy of 64 held-out rows, of the adapter in `folder` on the base in its usual type."""
    from peft import PeftModel

    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.evaluation.held_out import held_out_loss
    from adaptfleet.core.models.loading import load_base

    base, tokenizer, _ = load_base(ModelSpec())
    model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    rows = encode_all(load_dataset(DataSpec()).test[:64], tokenizer, PACK_TOKENS)
    return held_out_loss(model, rows, PACK_TOKENS, tokenizer.pad_token_id).loss


def child(contender: str, steps: int, out: Path) -> None:
    folder = out.parent / contender
    folder.mkdir(parents=True, exist_ok=True)
    found = run_ours(steps, folder) if contender == "ours" else run_trl(steps, folder, contender == "trl_best")
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["held_out_loss"] = held_out(folder)
    out.write_text(json.dumps(found))


def peer_python() -> Path:
    """An environment with TRL that sees the packages of .venv."""
    python = PEERS / "bin" / "python"
    if not (PEERS / "ready").exists():
        venv.create(PEERS, with_pip=True, clear=True)
        site = next((PEERS / "lib").glob("python3.*/site-packages"))
        shared = next((REPOSITORY / ".venv" / "lib").glob("python3.*/site-packages"))
        (site / "shared.pth").write_text(f"{shared}\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", f"trl=={TRL}"], check=True)
        (PEERS / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.steps, arguments.out)
        return
    work = REPOSITORY / "build" / "bench-train"
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for contender in arguments.only:
        python = sys.executable if contender == "ours" else peer_python()
        out = work / f"{contender}.json"
        command = [python, __file__, "--child", contender, "--steps", str(arguments.steps), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "platform"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        print(f"{contender}: {arguments.steps} steps ...", flush=True)
        with (work / f"{contender}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
        found[contender] = json.loads(out.read_text())
    report(found, arguments.steps)


def report(found: dict[str, Any], steps: int) -> None:
    print(f"{'':12} {'tokens/s':>9} {'peak RSS MB':>12} {'last losses':>12} {'held out':>9} {'tokens':>8}")
    for name, values in found.items():
        last = sum(values["losses"][-5:]) / 5
        print(
            f"{name:12} {values['tokens_per_s']:9.0f} {values['peak_rss_mb']:12.0f} {last:12.3f} {values['held_out_loss']:9.3f} "
            f"{values['num_tokens']:8,}"
        )
    ratios: dict[str, float] = {}
    if "ours" in found:
        ours = found["ours"]
        for name, key in (("trl_best", "ratio_vs_trl_best"), ("trl_default", "ratio_vs_trl_default")):
            if name in found:
                ratios[key] = round(ours["tokens_per_s"] / found[name]["tokens_per_s"], 3)
        if "trl_best" in found:
            ratios["peak_rss_ratio_vs_trl"] = round(ours["peak_rss_mb"] / found["trl_best"]["peak_rss_mb"], 3)
            ratios["loss_gap"] = round(ours["held_out_loss"] - found["trl_best"]["held_out_loss"], 4)
    for key, value in ratios.items():
        print(f"{key} {value}")
    if set(found) == set(CONTENDERS):
        machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
        RESULTS.write_text(json.dumps({"machine": machine, "steps": steps, "trl": TRL, **ratios, "contenders": found}, indent=1) + "\n")
        print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
