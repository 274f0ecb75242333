"""What `bench/serve.py` measures of many adapters and of several replicas. The embedded base throughout, one engine thread each."""

import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chat_load import load
from serve import bare_vllm, endpoint, free_port, say

NUM_ADAPTERS, RANK, ZIPF = 1000, 8, 1.0
REQUESTS, CONCURRENCY = 64, 8
COLD, PUBLISHED = 15, 5
CLIENTS, SECONDS_BEFORE, SECONDS_AFTER = 12, 5, 10
"""Of the load around a kill, and how long it goes on before and after."""


# adapters


def measure_adapters(model: Path, rounds: int) -> dict[str, Any]:
    from adaptfleet.contracts.serving import ServingSpec

    spec = ServingSpec(cpus_per_replica=1, max_loras=8, max_cpu_loras=64, max_lora_rank=RANK)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        os.environ["ADAPTFLEET_STORE"] = (scratch / "store").as_uri()
        started = time.perf_counter()
        names = publish_many(model, scratch, NUM_ADAPTERS)
        say(f"{NUM_ADAPTERS} adapters published in {time.perf_counter() - started:.0f} s")
        url, key = stack.enter_context(endpoint(spec, scratch))
        say("the endpoint is up")
        chance = random.Random(1)
        weights = [1 / (rank + 1) ** ZIPF for rank in range(NUM_ADAPTERS)]
        rows: dict[str, list[dict[str, float]]] = {"one": [], "many": []}
        for round_number in range(-1, rounds):
            for side in ("one", "many") if round_number % 2 else ("many", "one"):
                models = [names[0]] * REQUESTS if side == "one" else chance.choices(names, weights, k=REQUESTS)
                row = load(url, key, models, CONCURRENCY, seed=round_number)
                if round_number >= 0:
                    rows[side].append(row)
                    say(f"round {round_number + 1}: {side} {row['tokens_per_s']:.1f} tokens/s, TTFT p95 {row['ttft_p95_ms']:.0f} ms")
        median = {side: {name: statistics.median(row[name] for row in runs) for name in runs[0]} for side, runs in rows.items()}
        cold, warm = [], []
        for name in chance.sample(names[NUM_ADAPTERS // 2 :], COLD):
            first = load(url, key, [name], 1, seed=7, num_tokens=2)["ttft_p50_ms"]
            again = load(url, key, [name], 1, seed=8, num_tokens=2)["ttft_p50_ms"]
            cold.append(first)
            warm.append(again)
        servable = []
        for number in range(PUBLISHED):
            name = f"fresh-{number}"
            publish_many(model, scratch, 1, prefix=f"fresh-{number}-of")
            began = time.perf_counter()
            asyncio.run(until_answered(url, key, f"{name}-of-0"))
            servable.append(time.perf_counter() - began)
    return {
        "many_adapters_ratio": round(median["many"]["tokens_per_s"] / median["one"]["tokens_per_s"], 3),
        "many_adapters_ttft_p95_ratio": round(median["many"]["ttft_p95_ms"] / median["one"]["ttft_p95_ms"], 2),
        "cold_load_ms_p50": round(statistics.median(a - b for a, b in zip(cold, warm, strict=True)), 1),
        "publish_to_servable_s": round(statistics.median(servable), 2),
        "adapters": {
            "registered": NUM_ADAPTERS,
            "slots": spec.max_loras,
            "in_memory": spec.max_cpu_loras,
            "rank": RANK,
            "medians": median,
            "first_request_ms_p50": round(statistics.median(cold), 1),
            "second_request_ms_p50": round(statistics.median(warm), 1),
        },
    }


def make_adapter(model: Path, folder: Path) -> None:
    """Of all linear layers, unless it is there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), config).save_pretrained(folder)


def publish_many(model: Path, scratch: Path, count: int, prefix: str = "street") -> list[str]:
    """Adapters of all linear layers, each with weights of its own."""
    import torch
    from safetensors.torch import load_file, save_file

    from adaptfleet.contracts.artifacts import Draft
    from adaptfleet.core.models.loading import base_revision
    from adaptfleet.store.registry import Registry

    folder = scratch / "adapter"
    make_adapter(model, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    registry = Registry.open()
    revision = base_revision(model)
    names = []
    for number in range(count):
        first = next(name for name in tensors if "lora_A" in name)
        tensors[first] = torch.randn_like(tensors[first]) * 0.02
        save_file(tensors, file, metadata={"format": "pt"})
        name = f"{prefix}-{number}"
        draft = Draft(kind="adapter", name=name, base="smollm2-135m", base_revision=revision, method={"kind": "lora", "rank": RANK})
        registry.publish(draft, folder, "prod")
        names.append(name)
    return names


def publish_loud(model: Path, scratch: Path, name: str, seed: int, alias: str | None = None) -> int:
    """A version of `name` whose answers are its own, so that another's would be seen. Returns its number."""
    import torch
    from safetensors.torch import load_file, save_file

    from adaptfleet.contracts.artifacts import Draft
    from adaptfleet.core.models.loading import base_revision
    from adaptfleet.store.registry import Registry

    folder = scratch / "loud"
    make_adapter(model, folder)
    file = folder / "adapter_model.safetensors"
    torch.manual_seed(seed)
    tensors = {key: torch.randn_like(tensor) * (0.08 if "lora_A" in key else 0.05) for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    registry = Registry.open()
    draft = Draft(kind="adapter", name=name, base="smollm2-135m", base_revision=base_revision(model), method={"kind": "lora", "rank": RANK})
    manifest = registry.publish(draft, folder, alias)
    return int(manifest.version)


async def until_answered(url: str, key: str, model: str) -> None:
    import aiohttp

    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        while True:
            async with session.post(f"{url}/v1/completions", json=body) as reply:
                if reply.status == 200:
                    return
            await asyncio.sleep(0.02)


# kill: one of two engines, under load


def measure_kill(model: Path) -> dict[str, Any]:
    from adaptfleet.contracts.serving import ServingSpec

    spec = ServingSpec(cpus_per_replica=1, replicas=2, max_num_seqs=8)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # A second bare engine beside one that bears what the surviving replica will: what a replacement has to do, on a machine as busy.
        started = time.perf_counter()
        with bare_vllm(spec, model) as survivor:
            say(f"a bare engine is up after {time.perf_counter() - started:.1f} s (its first start)")
            bare_start_s = asyncio.run(start_beside(survivor, spec, model))
        say(f"a bare engine beside another starts in {bare_start_s:.1f} s")
        url, key = stack.enter_context(endpoint(spec, Path(folder), num_cpus=4))
        asyncio.run(until_replicas(url, key, 2))
        say("two replicas are up")
        outcomes, recovery_s = asyncio.run(kill_one(url, key))
    lost = [outcome for outcome in outcomes if outcome["ended"] != "whole"]
    silent = [outcome for outcome in lost if outcome["ended"] == "broken"]
    return {
        "kill_lost_requests": sum(outcome["tokens"] == 0 for outcome in lost),
        "kill_silently_broken": len(silent),
        "kill_ended_with_error_event": len(lost) - len(silent),
        "kill_requests": len(outcomes),
        "kill_recovery_s": round(recovery_s, 1),
        "bare_engine_start_s": round(bare_start_s, 1),
        "kill_recovery_ratio": round(recovery_s / bare_start_s, 2),
    }


async def start_beside(survivor: str, spec: Any, model: Path) -> float:
    """Seconds of a bare engine's start beside another that answers what `kill_one` asks of the replica that is left."""
    import aiohttp

    outcomes: list[dict[str, Any]] = []
    stop = asyncio.Event()
    with ExitStack() as stack:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
            load = [asyncio.create_task(ask_on(session, survivor, stop, outcomes, number)) for number in range(CLIENTS)]
            await asyncio.sleep(SECONDS_BEFORE)
            started = time.perf_counter()
            asyncio.get_running_loop().call_later(SECONDS_AFTER, stop.set)
            await asyncio.to_thread(stack.enter_context, bare_vllm(spec, model))
            took = time.perf_counter() - started
            await asyncio.gather(*load)
    if not all(outcome["ended"] == "whole" for outcome in outcomes):
        raise RuntimeError(f"the bare engine failed requests of the load: {outcomes[-3:]}")
    return took


async def kill_one(url: str, key: str) -> tuple[list[dict[str, Any]], float]:
    import aiohttp

    outcomes: list[dict[str, Any]] = []
    stop = asyncio.Event()
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(total=300)) as session:
        load = [asyncio.create_task(ask_on(session, url, stop, outcomes, number)) for number in range(CLIENTS)]
        await asyncio.sleep(SECONDS_BEFORE)
        os.kill(engine_pids()[0], signal.SIGKILL)
        killed = time.perf_counter()
        await asyncio.sleep(SECONDS_AFTER)
        stop.set()
        await asyncio.gather(*load)
    await until_replicas(url, key, 2)
    return outcomes, time.perf_counter() - killed


async def ask_on(session: Any, url: str, stop: asyncio.Event, outcomes: list[dict[str, Any]], number: int) -> None:
    while not stop.is_set():
        outcomes.append(await ask(session, url, f"Request {len(outcomes)} of {number}. "))


async def ask(session: Any, url: str, prompt: str, num_tokens: int = 32) -> dict[str, Any]:
    import aiohttp

    body = {"model": "smollm2-135m", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    outcome: dict[str, Any] = {"tokens": 0, "ended": "broken", "replica": ""}
    try:
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            outcome["replica"] = reply.headers.get("x-replica", "")
            if reply.status != 200:
                return outcome | {"ended": f"status {reply.status}"}
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        outcome["ended"] = "error event"
                    elif event["choices"]:
                        outcome["tokens"] += 1
                        if event["choices"][0]["finish_reason"]:
                            outcome["ended"] = "whole"
    except aiohttp.ClientError:
        outcome["ended"] = "broken"
    return outcome


async def until_replicas(url: str, key: str, count: int) -> None:
    """Until so many have answered a burst each request of which they share."""
    import aiohttp

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        seen: set[str] = set()
        while len(seen) < count:
            outcomes = await asyncio.gather(*(ask(session, url, f"{number} ", 4) for number in range(4 * count)))
            seen = {outcome["replica"] for outcome in outcomes if outcome["ended"] == "whole"}
            await asyncio.sleep(0.2)


def engine_pids() -> list[int]:
    """The engines of this benchmark's cluster: those with its folder in their environment."""
    sign = f"RAY_AUTH_TOKEN_PATH={os.environ['RAY_AUTH_TOKEN_PATH']}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            is_engine = entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"VLLM::EngineCore")
            if is_engine and sign in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
        except OSError:
            continue
    return sorted(pids)


# rescale: 1 -> 2 -> 1 by the autoscaler, then every replica replaced


def measure_rescale() -> dict[str, Any]:
    from adaptfleet.contracts.serving import ReplicaRange, ServingSpec

    grows = ReplicaRange(min=1, max=2, requests_per_replica=4, upscale_delay_s=1, downscale_delay_s=5)
    spec = ServingSpec(cpus_per_replica=1, replicas=grows, max_num_seqs=8)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port = free_port()
        url, key = stack.enter_context(endpoint(spec, Path(folder), num_cpus=4, port=port))
        outcomes, seconds = asyncio.run(rescale(url, key, spec, port))
    failed = [outcome for outcome in outcomes if outcome["ended"] != "whole"]
    return {
        "rescale_failed_requests": len(failed),
        "rescale_requests": len(outcomes),
        "rescale_seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


async def rescale(url: str, key: str, spec: Any, port: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    import aiohttp

    from adaptfleet.on_ray.serve.deploy import deploy

    outcomes: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(total=300)) as session:
        always, burst = asyncio.Event(), asyncio.Event()
        steady = [asyncio.create_task(ask_on(session, url, always, outcomes, 0))]
        extra = [asyncio.create_task(ask_on(session, url, burst, outcomes, number)) for number in range(1, 9)]
        seconds["1 to 2"] = await until_count(2)
        await asyncio.sleep(5)
        burst.set()
        await asyncio.gather(*extra)
        seconds["2 to 1"] = await until_count(1)
        started = time.perf_counter()
        await asyncio.to_thread(deploy, spec.model_copy(update={"max_num_seqs": 6}), port=port)
        await until_count(1)
        seconds["replaced"] = time.perf_counter() - started
        await asyncio.sleep(5)
        always.set()
        await asyncio.gather(*steady)
    return outcomes, seconds


async def until_count(count: int) -> float:
    """Seconds until so many replicas run and none comes or goes."""
    from ray import serve
    from ray.serve.schema import ReplicaState

    started = time.perf_counter()
    while True:
        application = (await asyncio.to_thread(serve.status)).applications["adaptfleet"]
        if application.deployments["endpoint"].replica_states == {ReplicaState.RUNNING: count} and application.status == "RUNNING":
            return time.perf_counter() - started
        await asyncio.sleep(0.2)
