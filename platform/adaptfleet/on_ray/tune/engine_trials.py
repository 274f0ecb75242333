"""Trials that are measured in the real engine: a checkpoint by decoding, a serving spec under a load of requests."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.models.device import device, model_dtype
from adaptfleet.core.models.loading import resolve_model_folder
from adaptfleet.on_ray.compress.engine_proof import engine_proof
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.on_ray.tune.compress_steps import checkpoint_folder
from adaptfleet.on_ray.tune.finalist_steps import engine_metrics

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 48, 96, 32
_SHOWN_LINES = 8


def checkpoint_in_engine(sweep: str, folder: str, job: CompressJob, checkpoint: str | None) -> dict[str, float]:
    place = checkpoint_folder(sweep, folder, checkpoint)
    dtype = str(model_dtype(ModelSpec(source=str(place), dtype=job.model.dtype))).removeprefix("torch.")
    return engine_metrics(engine_proof(place, dtype, [([1, 2, 3], [False, True, True])], job.proof.threads, job.proof.rounds))


def under_load(spec: ServingSpec) -> dict[str, float]:
    """Starts the engine with the spec's arguments in a new process, and sends it many requests at once. ServingError: it does not start."""
    import torch

    place = resolve_model_folder(at_hand(spec.model))
    dtype = str(model_dtype(spec.model)).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        request, reply, said = (Path(scratch) / name for name in ("request.json", "reply.json", "log"))
        threads = spec.cpus_per_replica or torch.get_num_threads()
        values = {"folder": str(place), "dtype": dtype, "num_threads": threads, "device": device().type}
        request.write_text(json.dumps({**values, "spec": spec.model_dump(mode="json")}))
        with said.open("wb") as log:
            command = [sys.executable, "-m", "adaptfleet.on_ray.tune.engine_trials", str(request), str(reply)]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not reply.is_file():
            lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
            raise ServingError("vLLM does not start with these arguments: the end of what it said:\n" + "\n".join(lines[-_SHOWN_LINES:]))
        found: dict[str, float] = json.loads(reply.read_text())
    return found


def measure(request: dict[str, Any]) -> dict[str, float]:
    """In the engine's own process. All requests stand before it at once, as after a burst: the last of them waits longest."""
    import asyncio

    from adaptfleet.on_ray.serve.engine import argv, parse, set_environment, start_engine
    from adaptfleet.on_ray.serve.workload import Workload

    spec = ServingSpec.model_validate(request["spec"], strict=False)
    set_environment(spec, request["num_threads"], request["device"])
    before, began = _resident_bytes(), time.perf_counter()
    arguments = parse(argv(spec, Path(request["folder"]), request["dtype"]))

    async def run() -> dict[str, float]:
        engine = start_engine(arguments, Workload())
        load_s, grown = time.perf_counter() - began, _resident_bytes() - before
        vocabulary = engine.model_config.get_vocab_size()
        await asyncio.gather(*(_ask(engine, i, 4, vocabulary) for i in range(2)))  # warm
        start = time.perf_counter()
        times = await asyncio.gather(*(_ask(engine, i + 2, NEW_TOKENS, vocabulary) for i in range(NUM_REQUESTS)))
        wall = time.perf_counter() - start
        cache = engine.vllm_config.cache_config
        firsts, wholes = sorted(t[0] for t in times), sorted(t[1] for t in times)
        found = {
            "time_to_first_token_s": statistics.median(firsts),
            "time_to_first_token_p95_s": firsts[int(0.95 * (len(firsts) - 1))],
            "request_p95_s": wholes[int(0.95 * (len(wholes) - 1))],
            "tokens_per_s": NUM_REQUESTS * NEW_TOKENS / wall,
            "kv_cache_tokens": float(int(cache.num_gpu_blocks or 0) * int(cache.block_size)),
            "memory_bytes": float(grown - (spec.kv_cache_gib * 2**30 if request["device"] == "cpu" else 0)),
            "load_s": load_s,
        }
        engine.shutdown()
        return found

    return asyncio.run(run())


def _resident_bytes() -> int:
    """Of this process and the engine's own beside it."""
    import psutil

    process = psutil.Process()
    return int(sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))


async def _ask(engine: Any, seed: int, num_tokens: int, vocabulary: int) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    from vllm import SamplingParams, TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=[(7919 * seed + 31 * t) % vocabulary for t in range(PROMPT_TOKENS)])
    parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    began, first = time.perf_counter(), 0.0
    async for _ in engine.generate(prompt, parameters, request_id=f"r{seed}-{num_tokens}"):
        first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
