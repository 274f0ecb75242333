"""A long mixed load on two replicas, while adapters are published anew, engines killed and replicas replaced: wrong answers, lost requests,
memory.

    python bench/soak.py [--minutes 30]

Clients ask the base and six adapters without a pause, streamed and greedily, in float32, where the order of sums decides no token. Each
model's answers are taken down before; every answer of the soak is compared with them. Once in EVERY_S a disturbance comes, in turn:

publish   a new version of an adapter goes into production; its answers change, and soon no old one may come
kill      kill -9 of one engine
replace   a deployment with another setting replaces both replicas

wrong_answers   whole answers that are not the model's
lost_requests   refused or broken off before their first token
silently_broken broken off after it without an error event
memory_ratio    of each kind of process, the largest one's resident memory: median of the last quarter over that of the second

Results: the section `soak` of bench/results/serve.json.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import serve
from serve_fleet import engine_pids, publish_loud, until_replicas

NAMES = [f"street-{i}" for i in range(6)]
PROMPTS = ["The capital of France is", "Once upon a time there was a", "Numbers count things, and", "My address is 12 Main"]
EVENTS = ("publish", "kill", "publish", "replace")
NUM_TOKENS, CLIENTS, EVERY_S = 16, 6, 75.0
SETTLED_S = 5.0
"""After a publication: how long the old version's answers are still right."""


@dataclass
class Soak:
    url: str
    key: str
    base: str
    right: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """Of (model, prompt)."""
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, str]] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    async def ask(self, session: Any, model: str, prompt: str) -> tuple[str, str]:
        """How it ended, and the text."""
        import aiohttp

        body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        text, ended = "", ""
        try:
            async with session.post(f"{self.url}/v1/completions", json=body) as reply:
                if reply.status != 200:
                    return f"lost: status {reply.status}", ""
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            return ("error event" if text else "lost: error event"), text
                        text += "".join(choice["text"] for choice in event["choices"])
                    elif line.startswith(b"data: [DONE]"):
                        ended = "whole"
        except (aiohttp.ClientError, TimeoutError):
            pass
        return ended or ("silently broken" if text else "lost: broken off"), text

    async def answers(self, session: Any, model: str) -> dict[str, str]:
        """To each prompt; asked again where a request is lost."""
        found: dict[str, str] = {}
        while len(found) < len(PROMPTS):
            for prompt in PROMPTS:
                ended, text = await self.ask(session, model, prompt)
                if ended == "whole":
                    found[prompt] = text
            await asyncio.sleep(0.1)
        return found

    async def client(self, session: Any, stop: asyncio.Event, number: int) -> None:
        chance = random.Random(number)
        while not stop.is_set():
            model, prompt = chance.choice([self.base, *NAMES]), chance.choice(PROMPTS)
            before = set(self.right[model, prompt])
            ended, text = await self.ask(session, model, prompt)
            self.ends[ended] += 1
            if ended == "whole" and text not in before | self.right[model, prompt]:
                self.wrong.append({"model": model, "prompt": prompt, "answer": text})

    async def watch(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.memory.append(await asyncio.to_thread(resident))
            await asyncio.sleep(5)

    async def publish(self, session: Any, new_version: Callable[[str, int], int], turn: int) -> None:
        from adaptfleet.store.registry import Registry

        name = NAMES[turn % len(NAMES)]
        version = await asyncio.to_thread(new_version, name, 100 + turn)
        new = await self.answers(session, f"{name}@{version}")
        for prompt, text in new.items():
            self.right[name, prompt].add(text)
        await asyncio.to_thread(Registry.open().set_alias, name, "prod", version)
        await asyncio.sleep(SETTLED_S)
        for prompt, text in new.items():
            self.right[name, prompt] = {text}


def resident() -> dict[str, float]:
    """MiB of the largest process of each kind in this benchmark's cluster."""
    sign = f"RAY_AUTH_TOKEN_PATH={os.environ['RAY_AUTH_TOKEN_PATH']}"
    largest: dict[str, float] = defaultdict(float)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if sign in (f"{key}={value}" for key, value in process.environ().items()):
                words = (process.cmdline() or [""])[0].split()
                kind = Path(words[0]).name if words else process.name()
                largest[kind] = max(largest[kind], process.memory_info().rss / 2**20)
    return dict(largest)


def memory_ratios(samples: list[dict[str, float]]) -> dict[str, float]:
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]

    def median(part: list[dict[str, float]], kind: str) -> float:
        return statistics.median(sample[kind] for sample in part if kind in sample)

    kinds = {kind for sample in early for kind in sample} & {kind for sample in late for kind in sample}
    return {kind: round(median(late, kind) / median(early, kind), 3) for kind in sorted(kinds)}


async def run(soak: Soak, spec: Any, port: int, new_version: Callable[[str, int], int], minutes: float) -> None:
    import aiohttp

    from adaptfleet.on_ray.serve.deploy import deploy

    headers, timeout = {"Authorization": f"Bearer {soak.key}"}, aiohttp.ClientTimeout(total=120)
    stop = asyncio.Event()
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        for model in [soak.base, *NAMES]:
            for prompt, text in (await soak.answers(session, model)).items():
                soak.right[model, prompt] = {text}
        tasks = [asyncio.create_task(soak.client(session, stop, number)) for number in range(CLIENTS)]
        tasks.append(asyncio.create_task(soak.watch(stop)))
        end, turn = time.monotonic() + 60 * minutes, 0
        while time.monotonic() + EVERY_S < end:
            await asyncio.sleep(EVERY_S)
            event = EVENTS[turn % len(EVENTS)]
            if event == "publish":
                await soak.publish(session, new_version, turn)
            elif event == "kill":
                os.kill(engine_pids()[0], signal.SIGKILL)
            else:
                await asyncio.to_thread(deploy, spec.model_copy(update={"max_num_seqs": 8 - turn // len(EVENTS) % 2}), port=port)
            soak.events[event] += 1
            turn += 1
            serve.say(f"{event}: {dict(soak.ends)}, {len(soak.wrong)} wrong")
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        stop.set()
        await asyncio.gather(*tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    os.environ.update(serve.CLUSTER_ENV)
    from adaptfleet.contracts.model import ModelSpec
    from adaptfleet.contracts.serving import ServingSpec
    from adaptfleet.core.models.embedded import embedded_model

    model = embedded_model("smollm2-135m")
    spec = ServingSpec(model=ModelSpec(dtype="float32"), cpus_per_replica=1, replicas=2, max_num_seqs=8, max_loras=4, max_lora_rank=8)
    with tempfile.TemporaryDirectory() as folder:
        scratch, port = Path(folder), serve.free_port()
        with serve.endpoint(spec, scratch, num_cpus=4, port=port) as (url, key):

            def new_version(name: str, seed: int) -> int:
                return publish_loud(model, scratch, name, seed)

            for seed, name in enumerate(NAMES):
                publish_loud(model, scratch, name, seed, "prod")
            asyncio.run(until_replicas(url, key, 2))
            serve.say("two replicas are up")
            soak = Soak(url, key, spec.base_id())
            asyncio.run(run(soak, spec, port, new_version, minutes))
    found = {
        "minutes": minutes,
        "events": dict(soak.events),
        "requests": sum(soak.ends.values()),
        "wrong_answers": len(soak.wrong),
        "lost_requests": sum(count for ended, count in soak.ends.items() if ended.startswith("lost")),
        "silently_broken": soak.ends["silently broken"],
        "ends": dict(soak.ends),
        "memory_ratio": memory_ratios(soak.memory),
        "memory_mib_at_the_end": {kind: round(value) for kind, value in soak.memory[-1].items()},
        "wrong": soak.wrong[:20],
    }
    print(json.dumps(found, indent=1))
    serve.save({**(json.loads(serve.RESULTS.read_text()) if serve.RESULTS.exists() else {}), "soak": found})


if __name__ == "__main__":
    main()
