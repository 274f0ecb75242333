"""Streamed chats against an OpenAI-compatible server, timed. The client is a process of its own: reading answers costs no server's time."""

import asyncio
import json
import random
import subprocess
import sys
import time
from itertools import pairwise

CHAT_TOKENS = 48


def load(url: str, key: str, models: list[str], concurrency: int, seed: int, num_tokens: int = CHAT_TOKENS) -> dict[str, float]:
    """Streamed chats, one for each entry of `models`, `concurrency` at once. Any failure ends the benchmark."""
    job = {"url": url, "models": models, "concurrency": concurrency, "seed": seed, "num_tokens": num_tokens}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({**job, "key": key}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the client failed against {url}")
    return dict(json.loads(done.stdout))


def question(number: int, seed: int) -> str:
    return f"Tell a story about the number {number} of round {seed}. " + "Go on. " * 12


def answer_tokens(number: int, seed: int, mean: int) -> int:
    """Of different lengths: equal ones end together, and then wait for each other's prompts."""
    return random.Random(f"{seed}-{number}").randint(mean // 2, mean * 3 // 2)


def client() -> None:
    print(json.dumps(asyncio.run(chats(**json.load(sys.stdin)))))


async def chats(url: str, key: str, models: list[str], concurrency: int, seed: int, num_tokens: int) -> dict[str, float]:
    import aiohttp

    gate = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def chat(number: int, model: str) -> tuple[float, list[float], int]:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": question(number, seed)}],
                "max_tokens": answer_tokens(number, seed, num_tokens),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            times, tokens = [], 0
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
                        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                if not times or not tokens:
                    raise SystemExit(f"{url} broke an answer off")
                return started, times, tokens

        started = time.perf_counter()
        results = await asyncio.gather(*(chat(number, model) for number, model in enumerate(models)))
        took = time.perf_counter() - started
    first = sorted(times[0] - begun for begun, times, _ in results)
    between = sorted(later - earlier for _, times, _ in results for earlier, later in pairwise(times))
    return {
        "tokens_per_s": sum(tokens for _, _, tokens in results) / took,
        "ttft_p50_ms": 1000 * first[len(first) // 2],
        "ttft_p95_ms": 1000 * first[int(len(first) * 0.95)],
        "itl_p50_ms": 1000 * between[len(between) // 2] if between else 0.0,
        "itl_p95_ms": 1000 * between[int(len(between) * 0.95)] if between else 0.0,
    }


if __name__ == "__main__":
    client()
