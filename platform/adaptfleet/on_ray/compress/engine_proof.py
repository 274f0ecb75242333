"""What the real engine makes of a checkpoint: `python -m adaptfleet.on_ray.compress.engine_proof REQUEST.json REPLY.json`.

A process of its own, so that loading is timed from nothing and no engine leaves a trace in the next one. The request: `folder`, `dtype`,
`num_threads`, `rounds`, `rows` (token ids and, for each, which of them count), `device`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import ServingSpec

BATCHES = (1, 16)
PROMPT_TOKENS, NEW_TOKENS = 32, 48
MAX_TOKENS = 1024
_SHOWN_LINES = 8


@dataclass(frozen=True)
class EngineProof:
    load_s: float
    """From the import to the first request's readiness, imports left out."""
    memory_bytes: int
    """By which the process grew while loading, less the KV cache's space on a CPU. What vLLM imports meanwhile counts too."""
    kv_cache_tokens: int
    """Tokens that the KV cache holds, with the platform's default space on a CPU."""
    time_to_first_token_s: float
    """Of a prompt of 32 tokens, alone."""
    tokens_per_s: dict[int, float]
    """Decoded, by batch size; wall time."""
    tokens_per_cpu_s: dict[int, float]
    """The same by the process's own CPU time: what is left of a busy machine's noise."""
    nats: float
    """Cross-entropy of the rows' counted tokens, summed, as the engine computes it."""


def engine_proof(folder: Path, dtype: str, rows: Sequence[tuple[list[int], list[bool]]], num_threads: int, rounds: int) -> EngineProof:
    """Starts the engine in a new process and waits. ServingError: it does not load the checkpoint, with the end of what it said."""
    from adaptfleet.core.models.device import device

    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        request, reply, said = (Path(scratch) / name for name in ("request.json", "reply.json", "log"))
        values = {"folder": str(folder), "dtype": dtype, "rows": rows, "num_threads": num_threads, "rounds": rounds}
        request.write_text(json.dumps({**values, "device": device().type}))
        with said.open("wb") as log:
            command = [sys.executable, "-m", "adaptfleet.on_ray.compress.engine_proof", str(request), str(reply)]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not reply.is_file():
            lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
            raise ServingError(f"vLLM does not serve {folder}: the end of what it said:\n" + "\n".join(lines[-_SHOWN_LINES:]))
        found = json.loads(reply.read_text())
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        found[key] = {int(batch): speed for batch, speed in found[key].items()}
    return EngineProof(**found)


def longest(folder: Path) -> int:
    """Tokens of a sequence here: enough to measure, and no more than the model has positions."""
    from transformers import AutoConfig

    return min(MAX_TOKENS, getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None) or MAX_TOKENS)


def measure(request: dict[str, Any]) -> EngineProof:
    from adaptfleet.on_ray.serve.engine import set_environment

    spec = ServingSpec(model=ModelSpec(source=request["folder"]))
    set_environment(spec, request["num_threads"], request["device"])
    # in this process: its memory and CPU time are the engine's
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import psutil
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    torch.set_num_threads(request["num_threads"])
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    llm = LLM(
        request["folder"],
        dtype=request["dtype"],
        max_model_len=longest(Path(request["folder"])),
        max_num_seqs=max(BATCHES),
        enforce_eager=spec.enforce_eager,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    load_s, grown = time.perf_counter() - began, process.memory_info().rss - before
    if request["device"] == "cpu":
        grown -= spec.kv_cache_gib * 2**30
    cache = llm.llm_engine.vllm_config.cache_config
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def generate(batch: int, num_tokens: int, seed: int) -> tuple[float, float]:
        prompts = [
            TokensPrompt(prompt_token_ids=[(7919 * (seed * batch + b) + 31 * t) % vocabulary for t in range(PROMPT_TOKENS)])
            for b in range(batch)
        ]
        parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - wall, time.process_time() - cpu

    speeds: dict[str, dict[int, float]] = {"wall": {}, "cpu": {}}
    first_token = 0.0
    for batch in BATCHES:
        generate(batch, 4, 0)  # warm
        firsts, wholes = [], []
        for i in range(request["rounds"]):
            firsts.append(generate(batch, 1, 2 * i + 1))
            wholes.append(generate(batch, NEW_TOKENS, 2 * i + 2))
        for place, kind in enumerate(("wall", "cpu")):
            seconds = statistics.median(whole[place] for whole in wholes) - statistics.median(first[place] for first in firsts)
            speeds[kind][batch] = batch * (NEW_TOKENS - 1) / seconds
        if batch == 1:
            first_token = statistics.median(first[0] for first in firsts)
    nats = _nats(llm, request["rows"])
    tokens = int(cache.num_gpu_blocks or 0) * int(cache.block_size)
    return EngineProof(load_s, grown, tokens, first_token, speeds["wall"], speeds["cpu"], nats)


def _nats(llm: Any, rows: Sequence[tuple[list[int], list[bool]]]) -> float:
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids, _ in rows], parameters, use_tqdm=False)
    return -sum(
        output.prompt_logprobs[t][ids[t]].logprob
        for output, (ids, counted) in zip(outputs, rows, strict=True)
        for t in range(1, len(ids))
        if counted[t]
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(measure(json.loads(Path(sys.argv[1]).read_text())))))
