"""Memory and time of data at scale: rows, tokens, plan and the first 1,000 steps' batches of 100,000 and of 1,000,000 small rows.

    python bench/data.py [--rows 1000000] [--steps 1000]

Each size is a process of its own, with a byte-level tokenizer made in code. What is measured is what a fine-tune does before its first
update, and the reading of its packs; no model is loaded. `peak_mb` is the most that was resident, mapped pages of the token file among
them, which the system takes back when it needs them; `peak_anonymous_mb`, seen every 50 ms, is what it cannot take back.
Results: bench/results/data.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "data.json"
SMALL = 100_000
PACK_TOKENS, PACKS_PER_STEP = 1024, 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_rows(file: Path, num_rows: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        for i in range(num_rows):
            a, b = i % 1009, i // 1009
            out.write(json.dumps({"prompt": f"What is {a} plus {b}, in words or in digits?", "completion": f"It is {a + b}."}) + "\n")


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


class Memory:
    """What this process has resident, watched from a thread."""

    def __init__(self) -> None:
        self.peak_anonymous_kb = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak_anonymous_kb = max(self.peak_anonymous_kb, _status("RssAnon"))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def measure(file: Path, num_steps: int) -> dict[str, Any]:
    import numpy as np

    from adaptfleet.contracts.data import DataSpec
    from adaptfleet.contracts.jobs import TrainSpec
    from adaptfleet.core.data.datasets import open_dataset
    from adaptfleet.core.data.packing import pack_arrays
    from adaptfleet.core.data.token_cache import Encoder, tokenise
    from adaptfleet.core.steps import plan_steps

    tokenizer = make_tokenizer()
    base_mb = _status("VmRSS") / 1024
    memory, times = Memory(), {}

    def timed(name: str, began: float) -> float:
        times[name] = round(time.perf_counter() - began, 2)
        return time.perf_counter()

    now = time.perf_counter()
    index = open_dataset(DataSpec(train=str(file), test_fraction=0.01))
    now = timed("scan_s", now)
    tokens = tokenise(index, Encoder(tokenizer, PACK_TOKENS, False), "bench")
    now = timed("tokenise_s", now)
    tokenise(index, Encoder(tokenizer, PACK_TOKENS, False), "bench")
    now = timed("cached_s", now)
    rows = tokens.rows(tokens.train)
    plan = plan_steps(rows, TrainSpec(epochs=3, pack_tokens=PACK_TOKENS, packs_per_step=PACKS_PER_STEP))
    now = timed("plan_3_epochs_s", now)
    num_steps = min(num_steps, len(plan.steps))
    num_tokens = 0
    for step in range(num_steps):
        for pack in plan.share(step, rank=0, num_workers=1):
            num_tokens += int(pack_arrays(pack, rows, PACK_TOKENS, 0)["label_mask_T"].sum())
    timed("read_steps_s", now)
    memory.stop()
    return {
        "rows": len(index.train) + len(index.test),
        "tokens": int(rows.lengths.sum(dtype=np.int64)),
        "steps_read": num_steps,
        "base_mb": round(base_mb),
        "peak_mb": round(_status("VmHWM") / 1024),
        "peak_anonymous_mb": round(memory.peak_anonymous_kb / 1024),
        **times,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.steps)))
        return 0
    results: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "sizes": []}
    for num_rows in (SMALL, arguments.rows):
        with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, num_rows)
            command = [sys.executable, __file__, "--measure", str(file), "--steps", str(arguments.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "ADAPTFLEET_HOME": folder})
            results["sizes"].append(json.loads(done.stdout))
            print(json.dumps(results["sizes"][-1]), flush=True)
    small, large = results["sizes"]
    results["rows_ratio"] = round(large["rows"] / small["rows"], 2)
    for name in ("peak_mb", "peak_anonymous_mb"):
        results[f"{name.removesuffix('_mb')}_ratio"] = round(large[name] / small[name], 3)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"rows x {results['rows_ratio']:g}: peak x {results['peak_ratio']}, anonymous x {results['peak_anonymous_ratio']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
