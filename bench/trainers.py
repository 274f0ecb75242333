"""The contenders of `bench/train.py`, each a process that trains a few steps when it is its turn. Not to be called by hand.

All train LoRA r16 on the linear modules of the embedded model, on `address-json`. `trl_best` comes first: it writes down the order in which
it will see the examples and its first weights, and `ours` begins with these weights and sees the same examples in the same packs.
"""

import argparse
import importlib
import json
import os
import resource
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, PACK_TOKENS, SEED = 16, 32, 1e-3, 1024, 0
TURN_STEPS = 3
"""Steps of one turn. The first turn is not counted: it compiles, and fills caches."""
CONTENDERS = ("trl_best", "ours", "trl_default", "llamafactory")
IGNORED = -100


class Turns:
    """Seconds and tokens of each step. Between turns the process waits; that time counts for nobody."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.steps: list[tuple[float, int]] = []
        self.peak_rss_mb = 0.0
        self._hear = os.fdopen(int(os.environ["BENCH_HEAR"]))
        self._say = os.fdopen(int(os.environ["BENCH_SAY"]), "w")
        self._began = 0.0

    def begin(self) -> None:
        self._wait("ready")

    def step_done(self, num_tokens: int) -> None:
        self.steps.append((time.perf_counter() - self._began, num_tokens))
        if len(self.steps) == self.num_steps:
            self.peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            return
        if len(self.steps) % TURN_STEPS == 0:
            self._wait("turn")
        self._began = time.perf_counter()

    def _wait(self, what: str) -> None:
        print(what, file=self._say, flush=True)
        self._hear.readline()
        self._began = time.perf_counter()


def run_ours(turns: Turns, work: Path) -> dict[str, Any]:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from adaptfleet.contracts.jobs import TrainSpec
    from adaptfleet.contracts.methods import Lora
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.compilation import compile_layers
    from adaptfleet.core.data.encoding import Encoded
    from adaptfleet.core.data.packing import PackTable
    from adaptfleet.core.loop import Trainer
    from adaptfleet.core.methods.choice import adaptation
    from adaptfleet.core.models.loading import load_base
    from adaptfleet.core.steps import StepPlan, Steps

    order = json.loads((work / "order.json").read_text())[: turns.num_steps]
    rows = [Encoded(ids, [label != IGNORED for label in labels]) for pack in order for ids, labels in pack]
    starts = np.cumsum([0, *map(len, order)], dtype=np.int64)
    num_tokens = sum(map(len, rows))
    packs = PackTable(np.arange(len(rows), dtype=np.int32), starts)
    plan = StepPlan(Steps(packs, 1), PACK_TOKENS, num_tokens, num_tokens / (len(order) * PACK_TOKENS))
    train = TrainSpec(pack_tokens=PACK_TOKENS, learning_rate=LEARNING_RATE, warmup_fraction=0.0, seed=SEED)
    base, tokenizer, _ = load_base(ModelSpec())
    method = adaptation(Lora(rank=RANK, alpha=ALPHA))
    model = method.attach(base, SEED)
    first = load_file(work / "first.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(first.pop(name))
    assert not first, f"weights without a place: {list(first)[:3]}"
    compile_layers(model)
    trainer = Trainer(model, method, train, plan, rows, tokenizer.pad_token_id)
    losses = []
    turns.begin()
    for result in trainer.run():
        losses.append(result.loss)
        turns.step_done(result.num_tokens)
    method.export(model, work / "ours", "smollm2-135m")
    return {"losses": losses, "settings": {"weights": str(base.dtype), "packs": "those of trl_best", "compiled": True}}


def counted(trainer_class: Any, seen: list[int], check: Callable[[int, Any], None] | None = None) -> Any:
    """The class, noting how many tokens that are no padding each step has."""

    class Counting(trainer_class):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen.append(int((mask != 0).sum()) if mask is not None and mask.dim() == 2 else inputs["input_ids"].numel())
            if check:
                check(len(seen) - 1, inputs)
            return super().training_step(model, inputs, *rest)

    return Counting


def follower(turns: Turns, seen: list[int], losses: list[float]) -> Any:
    """A callback of transformers' Trainer that takes turns."""
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.step_done(sum(seen))
            seen.clear()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    return Follow()


def run_trl(turns: Turns, work: Path, best: bool, variant: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.models.loading import resolve_model_folder

    trl: Any = importlib.import_module("trl")  # of the peers' environment, not of ours
    source = resolve_model_folder(ModelSpec())
    tokenizer = AutoTokenizer.from_pretrained(source)
    examples = load_dataset(DataSpec()).train
    if best:
        # tokens made by us, so that both see the same
        encoded = encode_all(examples, tokenizer, PACK_TOKENS)
        labels = [[t if counts else IGNORED for t, counts in zip(row.input_ids, row.label_mask, strict=True)] for row in encoded]
        data = Dataset.from_list([{"input_ids": row.input_ids, "labels": own} for row, own in zip(encoded, labels, strict=True)])
    else:
        chats = [[{"role": m.role, "content": m.content} for m in example.messages] for example in examples]
        data = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    attention = variant.pop("attention", "sdpa")
    dtype = torch.bfloat16 if best else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention)
    common = {
        "output_dir": str(work / "trainer"), "max_steps": turns.num_steps, "learning_rate": LEARNING_RATE, "seed": SEED,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    own = {
        "packing": True, "max_length": PACK_TOKENS, "per_device_train_batch_size": 1, "gradient_checkpointing": False, "bf16": True,
        "lr_scheduler_type": "cosine", **variant,
    }  # fmt: skip
    settings = trl.SFTConfig(**common, **(own if best else {}))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    seen: list[int] = []
    losses: list[float] = []
    order: list[list[tuple[list[int], list[int]]]] = []

    def same_order(_: int, inputs: Any) -> None:
        done = len(turns.steps)
        assert packs_of(inputs) == order[done], f"step {done + 1} does not see what order.json says"

    is_judged = best and not variant
    counting = counted(trl.SFTTrainer, seen, same_order if is_judged else None)
    follow = follower(turns, seen, losses)
    trainer = counting(model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[follow])
    if is_judged:
        from transformers import set_seed

        set_seed(SEED)
        for batch in trainer.get_train_dataloader():
            order.append(packs_of(batch))
            if len(order) == turns.num_steps:
                break
        (work / "order.json").write_text(json.dumps(order))
        first = {name: p.detach().float().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(first, work / "first.safetensors")
        set_seed(SEED)
    turns.begin()
    trainer.train()
    trainer.model.save_pretrained(str(work / ("trl_best" if best else "trl_default")), safe_serialization=True)
    names = (
        "bf16",
        "packing",
        "packing_strategy",
        "padding_free",
        "gradient_checkpointing",
        "per_device_train_batch_size",
        "torch_compile",
    )
    shown = {name: str(getattr(settings, name)) for name in names}
    weights = str(next(p for p in trainer.model.parameters() if not p.requires_grad).dtype)
    trained = str(next(p for p in trainer.model.parameters() if p.requires_grad).dtype)
    return {"losses": losses, "settings": {**shown, "weights": weights, "adapter": trained, "attention": attention}}


def packs_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    """The examples of a padding-free batch, as (ids, labels): a position of 0 begins one."""
    ids, labels, positions = (batch[key][0].tolist() for key in ("input_ids", "labels", "position_ids"))
    starts = [i for i, position in enumerate(positions) if position == 0]
    # the first token of an example is never predicted; collators mark that in different ways
    cut = [(ids[a:b], [IGNORED, *labels[a + 1 : b]]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [(list(tokens), list(own)) for tokens, own in cut]


def run_llamafactory(turns: Turns, work: Path, chats: Path) -> dict[str, Any]:
    """Its own packing without leakage (`neat_packing`), autocast to bfloat16 (CPUs get no `pure_bf16`), no gradient checkpointing."""
    import transformers

    tuner: Any = importlib.import_module("llamafactory.train.tuner")
    folder = work / "llamafactory-data"
    folder.mkdir(exist_ok=True)
    (folder / "chats.json").write_text(json.dumps([{"messages": chat} for chat in json.loads(chats.read_text())["chats"]]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    entry = {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"chats": entry}))
    seen: list[int] = []
    losses: list[float] = []
    trainer_module: Any = importlib.import_module("llamafactory.train.sft.workflow")
    trainer_module.CustomSeq2SeqTrainer = counted(trainer_module.CustomSeq2SeqTrainer, seen)
    settings = {
        "packing": True, "neat_packing": True, "bf16": True, "disable_gradient_checkpointing": True, "flash_attn": "sdpa",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    arguments = {
        "stage": "sft", "do_train": True, "model_name_or_path": json.loads(chats.read_text())["model"], "finetuning_type": "lora",
        "lora_rank": RANK, "lora_alpha": ALPHA, "lora_target": "all", "template": "smollm2", "dataset": "chats", "dataset_dir": str(folder),
        "cutoff_len": PACK_TOKENS, "max_steps": turns.num_steps, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "cosine",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": SEED,
        "output_dir": str(work / "llamafactory"), "overwrite_output_dir": True, "disable_tqdm": True, **settings,
    }  # fmt: skip

    class Begin(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

    tuner.run_exp(arguments, callbacks=[Begin(), follower(turns, seen, losses)])
    return {"losses": losses, "settings": {name: str(value) for name, value in settings.items()}}


def held_out(folders: list[Path]) -> dict[str, float]:
    """Mean cross-entropy of 64 held-out rows, of the adapter in each folder on the base in its usual type."""
    from peft import PeftModel

    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.evaluation.held_out import held_out_loss
    from adaptfleet.core.models.loading import load_base

    found = {}
    for folder in folders:
        base, tokenizer, _ = load_base(ModelSpec())
        model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
        rows = encode_all(load_dataset(DataSpec()).test[:64], tokenizer, PACK_TOKENS)
        found[folder.name] = held_out_loss(model, rows, PACK_TOKENS, tokenizer.pad_token_id).loss
    return found


def write_chats(file: Path) -> None:
    """The training rows and the model's folder, for an environment that cannot import the platform."""
    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.core.models.loading import resolve_model_folder

    chats = [[{"role": m.role, "content": m.content} for m in example.messages] for example in load_dataset(DataSpec()).train]
    file.write_text(json.dumps({"model": str(resolve_model_folder(ModelSpec())), "chats": chats}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*CONTENDERS, "held_out", "chats"])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variant", type=json.loads, default={})
    arguments = parser.parse_args()
    what, work = arguments.what, arguments.work
    if what == "chats":
        write_chats(work / "chats.json")
        return
    if what == "held_out":
        folders = [work / name for name in CONTENDERS if (work / name / "adapter_model.safetensors").exists()]
        (work / "held_out.json").write_text(json.dumps(held_out(folders)))
        return
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    turns = Turns(arguments.steps)
    if what == "ours":
        found = run_ours(turns, work)
    elif what == "llamafactory":
        found = run_llamafactory(turns, work, work / "chats.json")
    else:
        found = run_trl(turns, work, what == "trl_best", arguments.variant)
    libraries = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory")
    versions = {name: metadata.version(name) for name in libraries if _is_installed(name)}
    found |= {"steps": turns.steps, "peak_rss_mb": turns.peak_rss_mb, "versions": versions}
    (work / f"{what}.json").write_text(json.dumps(found))


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
