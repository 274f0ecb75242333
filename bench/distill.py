"""When a student learns more from a teacher than from the data alone, at an equal number of tokens.

    python bench/distill.py teacher [--seconds 480]                    # again until it says that it is done
    python bench/distill.py run [--data task] [--student width] [--arms ce kd-0.5 ...] [--seeds 0 1 2] [--learning-rates 2e-4]
    python bench/distill.py summary

teacher  the embedded base fine-tuned (full) on the training rows of address-json
student  width, narrow: the teacher with half, or three quarters, of its feed-forward channels pruned away and refitted, as
         jobs/compress.py does it. depth: the teacher's base with every third layer taken out (30 -> 20). tokens: the teacher with another
         tokenizer, a third of its own's merges, and the embeddings of the tokens that are left. The same for every arm
arms     ce: cross-entropy of the data's tokens. kd-A, rkl-A, jsd-A: forward KL, reverse KL, JSD from the teacher with alpha A (kd-1.0: no
         hard labels). kd-A-tT: with temperature T; kd-A-hW: with hidden states held to the teacher's, at weight W. piece-A: forward KL
         on pieces of text, for a student of another tokenizer. Every arm sees the same packed rows in the same order and makes as many
         updates.
data     task: rows of address-json. text: docstrings, no row of the task, as one recovers a pruned model with whatever text is at hand
seeds    another subset of `--rows` training rows or texts, in another order

A run is one arm, seed and learning rate; what is not finished after `--seconds` goes on at the next call. Each is measured on what neither
model saw: cross-entropy of a labelled token, exact match and field F1 of the task, cross-entropy of a token of text. The learning rate is
the one at which `ce` has the least loss on a validation part of the data, for every arm: what is searched is searched for `ce` alone. Then
differences to `ce` of the same seeds, with 95% t-intervals over the seeds. Teacher and student are trained in full.
Results: bench/results/distill.json, with all settings.
"""

import argparse
import copy
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import docstrings
from students import MERGES_KEPT, PACK_TOKENS, drop_layers, pruned, retokenised

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]
WORK = REPOSITORY / "build" / "bench-distill"
RESULTS = REPOSITORY / "bench" / "results" / "distill.json"
TEACHER_PACKS, STUDENT_PACKS = 2, 4
NUM_VALIDATION, NUM_HELD_OUT, NUM_TEXTS, MAX_NEW_TOKENS = 48, 149, 64, 64
TEACHER_STEPS, TEACHER_RATE = 240, 2e-4
METRICS = ("loss", "exact_match", "field_f1", "text_loss")
DIVERGENCES = {"kd": "forward_kl", "rkl": "reverse_kl", "jsd": "jsd", "piece": "forward_kl"}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, by degrees of freedom."""


@dataclass(frozen=True)
class Settings:
    arm: str
    seed: int
    learning_rate: float
    rows: int
    steps: int
    student: str
    data: str

    def name(self) -> str:
        return f"{self.data}_{self.student}_{self.arm}_seed{self.seed}_lr{self.learning_rate:g}_rows{self.rows}_steps{self.steps}"


class Clock:
    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.end


def texts() -> tuple[list[Any], list[Any], list[Any]]:
    """Docstrings to train on, to validate with, and held out, each part from all over the packages."""
    from adaptfleet.core.data.examples import Example

    file = WORK / "text.json"
    if not file.exists():
        file.write_text(json.dumps(docstrings()))
    found = [Example(text=text) for text in json.loads(file.read_text())]
    apart = len(found) // NUM_TEXTS
    train = [text for i, text in enumerate(found) if i % apart > 1]
    return train, found[1::apart][:NUM_VALIDATION], found[::apart][:NUM_TEXTS]


def task() -> tuple[list[Any], list[Any], list[Any]]:
    """Examples of the task to train on, to validate with, and held out."""
    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.core.data.datasets import load_dataset

    dataset = load_dataset(DataSpec())
    return list(dataset.train[NUM_VALIDATION:]), list(dataset.train[:NUM_VALIDATION]), list(dataset.test)


def train(trainer: Any, folder: Path, clock: Clock) -> bool:
    """Goes on from the folder's checkpoint; False: the time is over and a checkpoint is there."""
    from adaptfleet.core.checkpoint import read_progress, read_tensors, write_checkpoint

    kept = sorted(folder.glob("checkpoint-*"))
    if kept:
        trainer.load_state(read_tensors(kept[-1], trainer.state()), read_progress(kept[-1])["step"])
    for result in trainer.run():
        if result.step % 10 == 0 or result.step == 1:
            print(f"{folder.name}: step {result.step}/{len(trainer.plan.steps)}, loss {result.loss:.4f}", flush=True)
        is_last = result.step == len(trainer.plan.steps)
        if clock.is_over() or is_last:
            unfinished = folder / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            write_checkpoint(unfinished, trainer.state(), {"step": result.step})
            unfinished.rename(folder / f"checkpoint-{result.step:06}")
            for old in kept:
                shutil.rmtree(old)
            return is_last
    return True


def loaded(source: str) -> tuple[Any, Any]:
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.models.loading import load_base

    model, tokenizer, _ = load_base(ModelSpec(source=source))
    return model, tokenizer


def make_trainer(
    model: Any, rows: list[Any], pad_id: int, learning_rate: float, steps: int, packs: int, seed: int, objective: Any = None
) -> Any:
    from adaptfleet.contracts.jobs import TrainSpec
    from adaptfleet.contracts.methods import Full
    from adaptfleet.core.loop import Trainer
    from adaptfleet.core.methods.choice import adaptation
    from adaptfleet.core.steps import plan_steps

    spec = TrainSpec(epochs=1000, max_steps=steps, pack_tokens=PACK_TOKENS, packs_per_step=packs, learning_rate=learning_rate, seed=seed)
    adapted = adaptation(Full())
    return Trainer(adapted.attach(model, seed), adapted, spec, plan_steps(rows, spec), rows, pad_id, objective)


def measured(model: Any, tokenizer: Any, examples: list[Any], answers_too: bool = True) -> dict[str, float]:
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.evaluation.held_out import answer_scores, greedy_answers, held_out_loss

    def loss(of: list[Any]) -> float:
        return held_out_loss(model, encode_all(of, tokenizer, PACK_TOKENS, truncate=True), PACK_TOKENS, tokenizer.pad_token_id).loss

    examples = examples[:NUM_HELD_OUT]
    values = {"loss": loss(examples)}
    if answers_too:
        values |= answer_scores(greedy_answers(model, tokenizer, examples, MAX_NEW_TOKENS), examples).metrics()
        values["text_loss"] = loss(texts()[2])
    return values


def make_teacher(args: argparse.Namespace) -> bool:
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.export import export_model

    folder = WORK / "teacher"
    if (folder / "facts.json").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(args.threads)
    model, tokenizer = loaded("smollm2-135m")
    examples, _, test = task()
    rows = encode_all(examples, tokenizer, PACK_TOKENS)
    trainer = make_trainer(model, rows, tokenizer.pad_token_id, TEACHER_RATE, TEACHER_STEPS, TEACHER_PACKS, seed=0)
    if not train(trainer, folder, Clock(args.seconds)):
        print("not done; call again to go on")
        return False
    export_model(trainer.model, tokenizer, folder / "model")
    facts = {"held_out": measured(trainer.model, tokenizer, test), "tokens": trainer.plan.num_tokens}
    facts |= {"steps": TEACHER_STEPS, "learning_rate": TEACHER_RATE}
    (folder / "facts.json").write_text(json.dumps(facts))
    print("the teacher:", facts["held_out"])
    return True


def known_arm(name: str) -> str:
    if not re.fullmatch(rf"ce|({'|'.join(DIVERGENCES)})-[\d.]+(-[th][\d.]+)*", name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no arm; allowed: ce, or kd, rkl, jsd, piece with an alpha, such as kd-0.5, kd-1.0-t2-h0.5"
        )
    return name


def objective_of(arm: str, student: Any, teacher: Any, own: Any, tokenizer: Any, examples: list[Any]) -> Any:
    """None for plain cross-entropy. `own`: the student's tokenizer, `tokenizer`: the teacher's."""
    from adaptfleet.contracts.distillation import Distillation
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.distill.objective import KnowledgeDistillation
    from adaptfleet.core.distill.pieces import PieceDistillation, TextTeacher
    from adaptfleet.core.distill.shared_text import TokenBytes
    from adaptfleet.core.distill.teachers import OnlineTeacher

    if arm == "ce":
        return None
    kind, alpha, *rest = arm.split("-")
    options = {option[0]: float(option[1:]) for option in rest}
    spec = Distillation.model_validate(
        {
            "teacher": ModelSpec(),
            "unit": "piece" if kind == "piece" else "token",
            "divergence": DIVERGENCES[kind],
            "alpha": float(alpha),
            "temperature": options.get("t", 1.0),
            "align": {"hidden": options.get("h", 0.0)},
        }
    )
    if kind == "piece":
        mine, theirs = (encode_all(examples, t, PACK_TOKENS, truncate=True) for t in (own, tokenizer))
        reader = TextTeacher(teacher, theirs, PACK_TOKENS, tokenizer.pad_token_id)
        return PieceDistillation(spec, reader, mine, TokenBytes(own, "the student"), TokenBytes(tokenizer, "the teacher"))
    return KnowledgeDistillation(spec, OnlineTeacher(teacher, spec, student.config.vocab_size), student)


def run(args: argparse.Namespace) -> None:
    import torch

    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.data.sample_order import permutation

    torch.set_num_threads(args.threads)
    clock = Clock(args.seconds)
    if not make_teacher(args):
        return
    wanted = [
        Settings(arm, seed, rate, args.rows, args.steps, args.student, args.data)
        for seed in args.seeds
        for rate in args.learning_rates
        for arm in args.arms
    ]
    pending = [s for s in wanted if not (WORK / "runs" / s.name() / "result.json").exists()]
    print(f"{len(pending)} of {len(wanted)} runs are to be made")
    teacher, tokenizer = loaded(str(WORK / "teacher" / "model"))
    examples, _, test = task()
    material, validation, _ = texts() if args.data == "text" else task()
    folder = WORK / f"student-{args.student}"
    if args.student == "depth":
        source = "smollm2-135m"
    elif args.student == "tokens":
        source = str(retokenised(teacher, tokenizer, folder))
    else:
        source = str(pruned(args.student, teacher, tokenizer, examples, folder))
    start, own = loaded(source)
    if args.student == "depth":
        start = drop_layers(start)
    begun = WORK / f"begun-{args.student}.json"
    if not begun.exists():
        begun.write_text(json.dumps(measured(start, own, test)))
    for settings in pending:
        if clock.is_over():
            break
        folder = WORK / "runs" / settings.name()
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [material[i] for i in permutation(len(material), settings.seed, 0)[: settings.rows]]
        student = copy.deepcopy(start)
        objective = objective_of(settings.arm, student, teacher, own, tokenizer, chosen)
        rows = encode_all(chosen, own, PACK_TOKENS, truncate=True)
        began = time.monotonic()
        trainer = make_trainer(
            student, rows, own.pad_token_id, settings.learning_rate, settings.steps, STUDENT_PACKS, settings.seed, objective
        )
        if not train(trainer, folder, clock):
            break
        result = {
            "settings": asdict(settings),
            "tokens": trainer.plan.num_tokens,
            "validation": measured(student, own, validation, answers_too=False),
            "held_out": measured(student, own, test),
            "last_seconds": time.monotonic() - began,
        }
        (folder / "result.json.part").write_text(json.dumps(result))
        (folder / "result.json.part").rename(folder / "result.json")
        for kept in folder.glob("checkpoint-*"):
            shutil.rmtree(kept)
        print(settings.name(), {k: round(v, 4) for k, v in result["held_out"].items()}, f"{result['last_seconds']:.0f} s", flush=True)
    left = [s for s in wanted if not (WORK / "runs" / s.name() / "result.json").exists()]
    print(f"{len(left)} runs are left; call again to go on" if left else "all runs are made")


def interval(values: list[float]) -> dict[str, float]:
    """Mean with its 95% t-interval; no interval of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "num_seeds": len(values)}
    half = T_95.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_seeds": len(values)}


def _setting(of: dict[str, Any]) -> tuple[str, str, int, int]:
    return of["data"], of["student"], of["rows"], of["steps"]


def summary(args: argparse.Namespace) -> None:
    results = [json.loads(file.read_text()) for file in sorted((WORK / "runs").glob("*/result.json"))]
    groups: dict[tuple[str, str, int, int], dict[str, dict[float, dict[int, Any]]]] = {}
    for result in results:
        s = result["settings"]
        by_rate = groups.setdefault(_setting(s), {}).setdefault(s["arm"], {})
        by_rate.setdefault(s["learning_rate"], {})[s["seed"]] = result
    tables = []
    for (data, student, rows, steps), arms in sorted(groups.items()):
        best: dict[str, Any] = {}
        for arm, by_rate in sorted(arms.items(), key=lambda entry: entry[0] != "ce"):
            # chosen on the seeds that all learning rates have, by the validation part alone
            shared = set.intersection(*map(set, by_rate.values()))
            tried = {rate: statistics.fmean(seeds[s]["validation"]["loss"] for s in shared) for rate, seeds in by_rate.items()}
            rate = best["ce"][0] if "ce" in best else min(tried, key=lambda r: tried[r])
            if rate in by_rate:
                best[arm] = (rate, by_rate[rate], tried)
        untrained = json.loads((WORK / f"begun-{student}.json").read_text())
        table: dict[str, Any] = {"data": data, "student": student, "rows": rows, "steps": steps, "held_out_rows": NUM_HELD_OUT}
        table |= {"untrained": untrained, "arms": {}}
        for arm, (rate, seeds, tried) in best.items():
            metrics = [m for m in METRICS if all(m in r["held_out"] for r in seeds.values())]
            entry: dict[str, Any] = {"learning_rate": rate, "tokens": next(iter(seeds.values()))["tokens"], "seeds": sorted(seeds)}
            entry["validation_loss_of_rates"] = tried
            entry |= {m: interval([r["held_out"][m] for r in seeds.values()]) for m in metrics}
            plain = best["ce"][1] if "ce" in best else {}
            shared = sorted(set(seeds) & set(plain))
            if arm != "ce" and shared:
                entry["less_ce"] = {m: interval([seeds[s]["held_out"][m] - plain[s]["held_out"][m] for s in shared]) for m in metrics}
            table["arms"][arm] = entry
        tables.append(table)
    teacher = json.loads((WORK / "teacher" / "facts.json").read_text())
    shape = {"pack_tokens": PACK_TOKENS, "packs_per_step": STUDENT_PACKS, "held_out_texts": NUM_TEXTS}
    # what an earlier call reported of settings that this folder has no runs of
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"tables": [], "runs": []}
    tables += [table for table in earlier["tables"] if _setting(table) not in groups]
    results += [result for result in earlier["runs"] if _setting(result["settings"]) not in groups]
    report = {
        "teacher": teacher,
        "students": {
            "width": "the teacher less half of its feed-forward channels, refitted",
            "narrow": "the teacher less three quarters of them, refitted",
            "depth": "the base less every third layer",
            "tokens": f"the teacher with the first {MERGES_KEPT:,} of its tokenizer's merges",
        },
        "method": "full",
        "data": {"task": "address-json", "text": "docstrings, as bench/compress.py takes them"},
        "settings": shape | {"validation_rows": NUM_VALIDATION, "max_new_tokens": MAX_NEW_TOKENS},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "tables": tables,
        "runs": results,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    for table in tables:
        print(f"{table['data']}, {table['student']}, {table['rows']} rows, {table['steps']} steps; untrained: {table['untrained']}")
        for arm, entry in table["arms"].items():
            print(f"  {arm:12} lr {entry['learning_rate']:g}, {len(entry['seeds'])} seeds")
            for m in (m for m in METRICS if m in entry):
                less = entry.get("less_ce", {}).get(m)
                between = f" [{less.get('low', math.nan):+.4f}, {less.get('high', math.nan):+.4f}]" if less else ""
                print(f"    {m:12} {entry[m]['mean']:.4f}" + (f", less ce {less['mean']:+.4f}{between}" if less else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    teacher = actions.add_parser("teacher")
    teacher.add_argument("--threads", type=int, default=1)
    teacher.add_argument("--seconds", type=float, default=480)
    teacher.set_defaults(do=make_teacher)
    runs = actions.add_parser("run")
    runs.add_argument("--data", choices=["task", "text"], default="task")
    runs.add_argument("--student", choices=["width", "narrow", "depth", "tokens"], default="width")
    runs.add_argument("--arms", nargs="+", type=known_arm, default=["ce", "kd-0.5", "kd-1.0"])
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--learning-rates", nargs="+", type=float, default=[2e-4])
    runs.add_argument("--rows", type=int, default=60)
    runs.add_argument("--steps", type=int, default=16)
    runs.add_argument("--threads", type=int, default=1)
    runs.add_argument("--seconds", type=float, default=480)
    runs.set_defaults(do=run)
    actions.add_parser("summary").set_defaults(do=summary)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
