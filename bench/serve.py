"""Serving, measured: what adapters cost in one engine, and what the door and Ray Serve cost over bare vLLM.

    python bench/serve.py [--rounds 5] [--only engine|endpoint|peer|clients|adapters|kill|rescale]

engine    a batch of 16, greedy: four adapters (ranks 8 and 16 on all linear modules), every fifth request the base. The same prompts in
          three engines, each a process of its own: without LoRA, with the stacked plug-in, with stock vLLM's LoRA.
endpoint  streamed chats of the base at concurrency 8 and 16: this endpoint with keys, routing and metrics, and vLLM's own server with the
          same engine settings. Both servers run all the time; the client is a process of its own.
peer      `bench/serve_peer.py`: ray.serve.llm over the vLLM it asks for, beside this endpoint over its own.
clients   `bench/serve_clients.py`: the same load by this client and by vLLM's benchmark client.
adapters, kill, rescale
          `bench/serve_fleet.py`: a thousand adapters, an engine killed, replicas that come and go.

Each part writes its own keys and leaves the others' as they are. Rounds go through all sides in turn, back and forth, so that a busy moment
of the machine meets them all.
Results: bench/results/serve.json. CPU only: on a GPU the plug-in does nothing.
"""

import argparse
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
from pathlib import Path
from typing import Any

from chat_load import load

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "serve.json"
RANKS = (8, 16, 8, 16)
BATCH, NUM_TOKENS = 16, 64
CONCURRENCIES, REQUESTS_EACH = (8, 16), 4
SIDES = {"no LoRA": "adaptfleet_stacked_lora", "stacked LoRA (ours)": "adaptfleet_stacked_lora", "stock LoRA": "no-plugin-at-all"}
"""Each side's VLLM_PLUGINS. The plug-in is on without LoRA too: the same engine, with the same queues."""
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

CLUSTER_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
}
"""A private cluster on the loopback address. Ray reads these once, when it is imported."""


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
                    if engines[side].poll() is None:
                        engines[side].communicate()  # its end; the others have the machine's caches to themselves
                    continue
                engines[side].stdin.write("go\n")
                engines[side].stdin.flush()
                result = json.loads(expect(engines[side], "RESULT"))
                speeds[side].append(result["tokens_per_s"])
                answers[side] = result["tokens"]
                say(f"round {round_number + 1}: {side} {result['tokens_per_s']:.1f} tokens/s")
    none, ours, stock = SIDES
    # a round's sides met the same machine: the median of their ratios, not the ratio of medians
    ratios = {side: [round(one / other, 3) for one, other in zip(speeds[side], speeds[none], strict=False)] for side in (ours, stock)}
    of_base = [i for i in range(BATCH) if i % (len(RANKS) + 1) == len(RANKS)]
    return {
        "multi_lora_ratio_b16": statistics.median(ratios[ours]),
        "multi_lora_ratio_b16_rounds": ratios[ours],
        "stock_lora_ratio_b16": round(statistics.median(ratios[stock]), 3),
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
        servers = {"bare vLLM": (bare_url, "none", spec.base_id()), "endpoint (ours)": (url, key, spec.base_id())}
        rows = compared_loads(servers, rounds)
    results: dict[str, Any] = {"rounds": rounds, "medians": {}}
    bare, ours = servers
    for concurrency, sides in rows.items():
        median = {side: {name: statistics.median(row[name] for row in runs) for name in runs[0]} for side, runs in sides.items()}
        for key, name in (("throughput_ratio", "tokens_per_s"), ("ttft_p50_ratio", "ttft_p50_ms"), ("itl_p95_ratio", "itl_p95_ms")):
            results[f"{key}_c{concurrency}"] = median_ratio(sides[ours], sides[bare], name)
            results[f"{key}_c{concurrency}_rounds"] = [
                round(one[name] / other[name], 3) for one, other in zip(sides[ours], sides[bare], strict=True)
            ]
        results["medians"][f"c{concurrency}"] = {
            side: {name: round(value, 2) for name, value in row.items()} for side, row in median.items()
        }
    return results


def compared_loads(servers: dict[str, tuple[str, str, str]], rounds: int) -> dict[int, dict[str, list[dict[str, float]]]]:
    """By concurrency and server, a row a round. `servers`: address, key and model of each."""
    rows: dict[int, dict[str, list[dict[str, float]]]] = {c: {side: [] for side in servers} for c in CONCURRENCIES}
    for round_number in range(-1, rounds):  # the first warms up
        for concurrency in CONCURRENCIES:
            for side in in_turn(list(servers), round_number):
                url, key, model = servers[side]
                row = load(url, key, [model] * REQUESTS_EACH * concurrency, concurrency, seed=100 * round_number + concurrency)
                if round_number >= 0:
                    rows[concurrency][side].append(row)
                    say(
                        f"round {round_number + 1}, c={concurrency}: {side} {row['tokens_per_s']:.1f} tokens/s, "
                        f"TTFT {row['ttft_p50_ms']:.0f} ms, ITL p95 {row['itl_p95_ms']:.1f} ms"
                    )
    return rows


def median_ratio(ones: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    """A round's sides met the same machine: the median of the rounds' ratios."""
    return round(statistics.median(one[name] / other[name] for one, other in zip(ones, others, strict=True)), 3)


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
def endpoint(spec: Any, scratch: Path, num_cpus: int = 2, port: int | None = None) -> Iterator[tuple[str, str]]:
    """This endpoint on a cluster of its own, with the store in `scratch`."""
    import ray

    from adaptfleet.on_ray.local_cluster import LocalCluster
    from adaptfleet.on_ray.serve.api_keys import first_key
    from adaptfleet.on_ray.serve.deploy import deploy, undeploy

    os.environ["ADAPTFLEET_STORE"] = (scratch / "store").as_uri()
    with LocalCluster.start(num_cpus=num_cpus) as cluster:
        os.environ.update(cluster.env)
        try:
            yield deploy(spec, port=port or free_port()), first_key()
            undeploy()
        finally:
            ray.shutdown()


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


def await_url(url: str | urllib.request.Request, is_alive: Callable[[], bool], timeout_s: float = 600) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and is_alive():
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url if isinstance(url, str) else url.full_url} did not answer.")


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
        "multi_lora_ratio_b16": "tokens/s of a mixed batch of 16, over the engine without LoRA (aim: 0.85)",
        "stock_lora_ratio_b16": "the same with stock vLLM's LoRA",
        "base_rows_unchanged": "requests to the base with the answer of the engine without LoRA",
        "stock_base_rows_unchanged": "the same with stock vLLM's LoRA",
        "throughput_ratio_c8": "tokens/s at concurrency 8, over bare vLLM (aim: 0.99)",
        "throughput_ratio_c16": "the same at concurrency 16 (aim: 0.99)",
        "ttft_p50_ratio_c8": "time to first token, over bare vLLM (aim: 1.03)",
        "itl_p95_ratio_c8": "time between tokens, over bare vLLM (aim: 1.05)",
        "clients_throughput_ratio": "tokens/s that vLLM's benchmark client saw, over this one's of the same load",
        "clients_ttft_p50_ratio": "time to first token, likewise",
        "many_adapters_ratio": "tokens/s over 1,000 adapters asked for by Zipf's law, over one adapter (aim: 0.6)",
        "many_adapters_ttft_p95_ratio": "their time to first token, 95th percentile, over one adapter's (aim: 3)",
        "cold_load_ms_p50": "ms that the first request to an adapter takes more than its second (aim: 200)",
        "publish_to_servable_s": "from publishing an adapter to an answer of it by every replica (aim: 2)",
        "kill_lost_requests": "requests without a token that failed when an engine was killed (aim: 0)",
        "kill_recovery_ratio": "from the kill until both replicas answer, over a bare engine's start under the same load (aim: 1.2)",
        "rescale_failed_requests": "failed requests while replicas went 1, 2, 1 and were replaced (aim: 0)",
    }
    for name, meaning in meanings.items():
        if name in results:
            table.add_row(name, str(results[name]), meaning)
    Console().print(table)


PARTS = ("engine", "endpoint", "peer", "clients", "adapters", "kill", "rescale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--engine", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(arguments.engine[0], arguments.engine[1:])
        return
    os.environ.update(CLUSTER_ENV)
    import serve_clients
    import serve_fleet
    import serve_peer

    from adaptfleet.core.models.embedded import embedded_model

    model = embedded_model("smollm2-135m")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "engine": lambda: measure_engines(model, arguments.rounds),
        "endpoint": lambda: measure_endpoint(model, arguments.rounds),
        "peer": lambda: serve_peer.measure_peer(model, min(arguments.rounds, 3)),
        "clients": lambda: serve_clients.measure_clients(model, min(arguments.rounds, 3)),
        "adapters": lambda: serve_fleet.measure_adapters(model, min(arguments.rounds, 3)),
        "kill": lambda: serve_fleet.measure_kill(model),
        "rescale": serve_fleet.measure_rescale,
    }
    for part in [arguments.only] if arguments.only else PARTS:
        found = measures[part]()
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results |= found
        results["machine"] = {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()}
        results["libraries"] = {name: version(name) for name in ("vllm-cpu", "torch", "ray")}
        save(results)
    show(json.loads(RESULTS.read_text()))
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
