"""Two replicas behind HAProxy, each with an engine of its own."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.serve.endpoint.conftest import Endpoint, running_endpoint

ADAPTERS = [f"street-{i}" for i in range(6)]
STALL_S = 8.0


@dataclass
class Outcome:
    """One streamed request as its client saw it."""

    status: int = 0
    replica: str = ""
    text: str = ""
    finished: bool = False
    """vLLM said why the answer ended."""
    error: str = ""
    """The code of an error event."""
    broken: str = ""
    """The connection ended before the stream did."""


async def ask(client: httpx.AsyncClient, outcome: Outcome, model: str, prompt: str, num_tokens: int) -> Outcome:
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            outcome.status, outcome.replica = reply.status_code, reply.headers.get("x-replica", "")
            if reply.status_code != 200:
                outcome.error = (await reply.aread()).decode()
                return outcome
            done = False
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        outcome.error = str(event["error"])
                    elif event["choices"]:
                        outcome.text += event["choices"][0]["text"]
                        outcome.finished |= event["choices"][0]["finish_reason"] is not None
            outcome.broken = "" if done else "no [DONE]"
    except httpx.HTTPError as error:
        outcome.broken = repr(error)
    return outcome


def client_of(endpoint: Endpoint) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=endpoint.url, headers={"Authorization": f"Bearer {endpoint.key}"}, timeout=300, limits=httpx.Limits(max_connections=200)
    )


def engine_pids(endpoint: Endpoint) -> list[int]:
    from adaptfleet.on_ray.cluster.processes import members

    record = endpoint.cluster._record
    return sorted(
        process.pid
        for process in members(record.leader, record.marker)
        if Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"VLLM::EngineCore")
    )


def await_replicas(endpoint: Endpoint, count: int) -> None:
    """Until so many have an engine that answers."""
    seen: set[str] = set()
    until = time.monotonic() + 300
    while time.monotonic() < until:
        replies = asyncio.run(_ask_many(endpoint, 8))
        seen = {reply.replica for reply in replies if reply.finished}
        if len(seen) == count:
            return
        time.sleep(0.5)
    raise AssertionError(f"{len(seen)} of {count} replicas answer")


async def _ask_many(endpoint: Endpoint, count: int) -> list[Outcome]:
    async with client_of(endpoint) as client:
        return list(await asyncio.gather(*(ask(client, Outcome(), "tiny", f"Number {i} ", 24) for i in range(count))))


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    settings = {"replicas": 2, "max_num_seqs": 4, "max_model_len": 1024, "stall_s": STALL_S, "drain_s": 60.0, "pinned": (ADAPTERS[5],)}
    with running_endpoint(tmp_path_factory.mktemp("fleet"), num_cpus=4, **settings) as made:
        for seed, name in enumerate(ADAPTERS):
            made.publish(name, made.adapter(name, 4, seed + 1))
        await_replicas(made, 2)
        yield made
