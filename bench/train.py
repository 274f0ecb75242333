"""Training, measured against TRL's SFTTrainer and LLaMA-Factory on the same model, data, seed, rank and cores.

    python bench/train.py [--steps 15] [--only speed scaling]

speed    the contenders of `bench/trainers.py` live side by side and train three steps in turn, so that all meet the same machine:
         ours          this platform's loop: packed rows of 1,024 tokens, bfloat16, layers compiled
         trl_best      SFTTrainer at the best settings found: bfloat16 weights, packing, no gradient checkpointing, its fused loss
         trl_default   SFTTrainer as it comes: float32 weights, autocast, padding, gradient checkpointing, 8 rows a step
         llamafactory  its packing without leakage, autocast to bfloat16, no gradient checkpointing
scaling  fine-tuning jobs on a local cluster, one thread a worker: one worker, two, and so on for each round

tokens_per_s leaves out the first turn (compiling, caches); padding counts for nobody. peak_rss_mb is the process's own. `ours` begins
with the weights of trl_best and sees its examples in its order, so that losses can be compared step by step; held_out_loss is measured by
the same code on the same rows, of the adapter that each saved. The peers come into environments beside .venv: build/peers, which sees
.venv's packages, and build/peers-llamafactory, which has its own. Results: bench/results/train.json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import yaml
from peers import overlay

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY / "bench")]
RESULTS = REPOSITORY / "bench" / "results" / "train.json"
PEERS, FACTORY = REPOSITORY / "build" / "peers", REPOSITORY / "build" / "peers-llamafactory"
TRL, LLAMAFACTORY = "1.16.0", "0.9.5"
SHORT_STEPS = 9
"""Of the contenders whose losses are compared with nobody's."""
SCALING_STEPS, SCALING_WARM_STEPS, SCALING_PACKS = 8, 2, 4
FACTORY_NOTE = "pip installs it with its own torch, transformers and peft; padding-free attention of its own needs FlashAttention, a GPU's"


class Contender:
    """A process of `bench/trainers.py` that trains when it is told to."""

    def __init__(self, name: str, python: Path, steps: int, work: Path, variant: dict[str, Any] | None = None) -> None:
        self.name = name
        self.work = work
        hears, tells = os.pipe()
        listens, says = os.pipe()
        command = [str(python), str(REPOSITORY / "bench" / "trainers.py"), name, "--steps", str(steps), "--work", str(work)]
        environment = {
            **os.environ, "PYTHONPATH": str(REPOSITORY / "platform"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "BENCH_HEAR": str(hears), "BENCH_SAY": str(says),
        }  # fmt: skip
        with (work / f"{name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--variant", json.dumps(variant or {})],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, pass_fds=(hears, says),
            )  # fmt: skip
        os.close(hears), os.close(says)
        self._tell = os.fdopen(tells, "w")
        self._listen = os.fdopen(listens)
        self.is_training = bool(self._listen.readline())

    def turn(self) -> None:
        """Lets it train until its next pause or its end."""
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self._tell, flush=True)
        self.is_training = bool(self._listen.readline())

    def result(self) -> dict[str, Any]:
        if self._process.wait(timeout=300):
            raise RuntimeError(f"{self.name} failed; see {self.work / self.name}.log")
        found: dict[str, Any] = json.loads((self.work / f"{self.name}.json").read_text())
        return found

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def factory_python() -> Path | None:
    """An environment with LLaMA-Factory and what it asks for; None: it does not install here."""
    python = FACTORY / "bin" / "python"
    if not (FACTORY / "ready").exists():
        venv.create(FACTORY, with_pip=True, clear=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", f"llamafactory=={LLAMAFACTORY}"], check=False)
        if done.returncode:
            return None
        (FACTORY / "ready").touch()
    return python


def speed(steps: int, names: list[str], variant: dict[str, Any]) -> dict[str, Any]:
    from trainers import TURN_STEPS

    work = REPOSITORY / "build" / "bench-train"
    work.mkdir(parents=True, exist_ok=True)
    own = Path(sys.executable)
    tool = [str(own), str(REPOSITORY / "bench" / "trainers.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "platform")}
    subprocess.run([*tool, "chats", "--work", str(work)], check=True, env=environment)
    contenders: list[Contender] = []
    try:
        for name in names:
            python = own if name == "ours" else factory_python() if name == "llamafactory" else overlay(PEERS, f"trl=={TRL}")
            if python is None:
                print(f"{name} does not install here and is left out")
                continue
            print(f"{name} ...", flush=True)
            length = steps if name in ("trl_best", "ours") else min(steps, SHORT_STEPS)
            contenders.append(Contender(name, python, length, work, variant if name == "trl_best" else None))
        while any(contender.is_training for contender in contenders):
            for contender in contenders:
                if contender.is_training:
                    contender.turn()
        found = {}
        for contender in contenders:
            try:
                found[contender.name] = contender.result()
            except RuntimeError as error:
                # the others' figures stand without it
                if contender.name != "llamafactory":
                    raise
                print(error)
    finally:
        for contender in contenders:
            contender.kill()
    subprocess.run([*tool, "held_out", "--work", str(work)], check=True, env=environment, stdout=subprocess.DEVNULL)
    losses = json.loads((work / "held_out.json").read_text())
    for name, values in found.items():
        made = values.pop("steps")
        turns = [made[begin : begin + TURN_STEPS] for begin in range(TURN_STEPS, len(made), TURN_STEPS)]
        values["tokens_per_s_by_turn"] = [round(sum(n for _, n in turn) / sum(s for s, _ in turn), 1) for turn in turns]
        values["tokens_per_s"] = round(sum(n for _, n in made[TURN_STEPS:]) / sum(s for s, _ in made[TURN_STEPS:]), 1)
        values["first_turn_s"] = round(sum(s for s, _ in made[:TURN_STEPS]), 1)
        values["num_tokens"] = sum(n for _, n in made)
        values["held_out_loss"] = losses[name]
    return found


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of the table."""
    ours, figures = found["ours"], {}
    for name, key in (("trl_best", "trl_best"), ("trl_default", "trl_default"), ("llamafactory", "llamafactory")):
        if name in found:
            figures[f"ratio_vs_{key}"] = round(ours["tokens_per_s"] / found[name]["tokens_per_s"], 3)
            # those that end sooner are compared while they run
            by_turn = [a / b for a, b in zip(ours["tokens_per_s_by_turn"], found[name]["tokens_per_s_by_turn"], strict=False)]
            figures[f"ratio_vs_{key}_by_turn"] = [round(ratio, 2) for ratio in by_turn]
    if "trl_best" in found:
        theirs = found["trl_best"]
        figures["peak_rss_ratio_vs_trl"] = round(ours["peak_rss_mb"] / theirs["peak_rss_mb"], 3)
        gaps = [a - b for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        figures["loss_gap"] = round(statistics.mean(gaps[-5:]), 4)
        figures["loss_gap_largest_of_a_step"] = round(max(map(abs, gaps)), 4)
        neighbours = [abs(a - b) for a, b in zip(theirs["losses"][1:], theirs["losses"], strict=False)]
        figures["loss_change_between_steps"] = round(statistics.median(neighbours), 4)
        figures["held_out_loss_gap"] = round(ours["held_out_loss"] - theirs["held_out_loss"], 4)
    return figures


def scaling(rounds: int) -> dict[str, Any]:
    """Jobs of one and of two workers, one thread each, in turn on one local cluster."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    from adaptfleet.contracts.home import home
    from adaptfleet.core.data.embedded import embedded_dataset
    from adaptfleet.core.models.embedded import embedded_model
    from adaptfleet.on_ray.local_cluster import LocalCluster

    embedded_model("smollm2-135m"), embedded_dataset("address-json")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    modes: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        place = Path(folder)
        for kept in ("models", "cache"):
            (place / kept).symlink_to(home() / kept)
        with LocalCluster.start(num_cpus=2, env={"ADAPTFLEET_HOME": folder}) as cluster:
            for number in range(rounds):
                for workers in (1, 2):
                    made, modes[workers] = _job(cluster, place, workers, f"workers-{workers}-{number}")
                    seconds[workers].append(made)
                    print(f"{workers} workers: {made:.2f} s a step, {modes[workers]}", flush=True)
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {
        "scaling_2w": round(statistics.mean(seconds[1]) / statistics.mean(seconds[2]), 3), "ratios": [round(r, 3) for r in ratios],
        "seconds_a_step": {str(workers): [round(s, 2) for s in each] for workers, each in seconds.items()},
        "tokens_a_step": SCALING_PACKS * 1024, "shard": modes[2], "threads_per_worker": 1,
    }  # fmt: skip


def _job(cluster: Any, place: Path, workers: int, name: str) -> tuple[float, str]:
    """Mean seconds of a step after the first ones, and how `shard: auto` laid the model out."""
    contract = {
        "job": "finetune", "run": name, "data": {"train": "address-json"},
        "train": {"max_steps": SCALING_STEPS, "pack_tokens": 1024, "packs_per_step": SCALING_PACKS, "learning_rate": 1e-3, "compile": "on"},
        "evaluation": {"max_generated_rows": 0, "max_sample_rows": 0, "max_loss_rows": 1}, "checkpoint": {"every_steps": 1000},
        "cluster": {"workers": workers, "cpus_per_worker": 1}, "publish": None,
    }  # fmt: skip
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(contract))
    command = [sys.executable, str(REPOSITORY / "jobs" / "finetune.py"), "--config", str(file)]
    environment = {**os.environ, **cluster.env, "ADAPTFLEET_HOME": str(place)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the job of {workers} workers failed:\n{done.stdout[-3000:]}")
    lines = map(json.loads, (place / "runs" / name / "metrics.jsonl").read_text().splitlines())
    at = [line["at"] for line in lines if line["kind"] == "train"][SCALING_WARM_STEPS - 1 :]
    mode = next(mode for mode in ("ddp:", "fsdp2:", "none:") if f"; {mode}" in done.stdout).rstrip(":")
    return (at[-1] - at[0]) / (len(at) - 1), mode


def write(part: dict[str, Any]) -> None:
    """Lays a part of the results over what is there, whole or not at all."""
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**earlier, "machine": machine, **part}, indent=1) + "\n")
    unfinished.replace(RESULTS)
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


def main() -> None:
    from trainers import CONTENDERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=["speed", "scaling"], default=["speed", "scaling"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=1, help="of scaling")
    parser.add_argument("--variant", type=json.loads, default={}, help="other settings of trl_best, as JSON, to look for better ones")
    arguments = parser.parse_args()
    if "speed" in arguments.only:
        found = speed(arguments.steps, arguments.contenders, arguments.variant)
        print(f"{'':12} {'tokens/s':>9} {'peak RSS MB':>12} {'last losses':>12} {'held out':>9} {'tokens':>8}")
        for name, values in found.items():
            print(
                f"{name:12} {values['tokens_per_s']:9.0f} {values['peak_rss_mb']:12.0f} {statistics.mean(values['losses'][-5:]):12.3f} "
                f"{values['held_out_loss']:9.3f} {values['num_tokens']:8,}"
            )
        figures = compared(found) if "ours" in found else {}
        for key, value in figures.items():
            print(f"{key} {value}")
        if {"ours", "trl_best", "trl_default"} <= set(found) and not arguments.variant:
            note = FACTORY_NOTE if "llamafactory" in found else "LLaMA-Factory did not install or run here"
            write(
                {
                    "measured": time.strftime("%Y-%m-%d"),
                    "steps": arguments.steps,
                    **figures,
                    "contenders": found,
                    "notes": note,
                }
            )
    if "scaling" in arguments.only:
        found = scaling(arguments.rounds)
        print(json.dumps(found))
        write({"scaling_2w": found.pop("scaling_2w"), "scaling": found})


if __name__ == "__main__":
    main()
