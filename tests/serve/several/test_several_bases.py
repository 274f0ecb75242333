"""Two bases behind one address: who answers for which model, what is listed, and what one base's end does to the other."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from transformers import AutoTokenizer

from adaptfleet.cli.top import look
from adaptfleet.on_ray.cluster.processes import members
from tests.serve.endpoint.conftest import Endpoint
from tests.serve.fleet.conftest import Outcome, ask, client_of
from tests.serve.greedy import disagreements
from tests.serve.several.conftest import NUM_TOKENS, PROMPT, Several
from tests.serve.tiny_llama import load_adapted

pytestmark = pytest.mark.slow


def _wrong(endpoint: Endpoint, adapter: Path | None, answer: list[int]) -> list[str]:
    ids = AutoTokenizer.from_pretrained(endpoint.base)(PROMPT).input_ids
    return disagreements(load_adapted(endpoint.base, adapter), ids, answer)


def test_every_model_answers_as_itself(several: Several) -> None:
    endpoint = several.endpoint
    assert not _wrong(endpoint, None, endpoint.answer("tiny", PROMPT))
    for name in ("streets", "streets@1", "tiny:streets"):
        assert not _wrong(endpoint, endpoint.root / "streets", endpoint.answer(name, PROMPT)), name
    assert endpoint.answer("small", PROMPT, NUM_TOKENS) == several.answers["small"]
    for name in ("numbers", "numbers@prod", "small:numbers@1"):
        assert endpoint.answer(name, PROMPT, NUM_TOKENS) == several.answers["numbers"], name
    answers = [tuple(endpoint.answer(name, PROMPT)) for name in ("tiny", "streets", "small", "numbers")]
    assert len(set(answers)) == 4, "else a request in the wrong place would not be seen"


def test_all_are_listed_each_adapter_with_its_own_base(several: Several) -> None:
    listed = {model.id: model.model_dump().get("parent") for model in several.endpoint.client().models.list()}
    assert listed == {
        "tiny": None,
        "small": None,
        "streets": "tiny",
        "streets@1": "tiny",
        "numbers": "small",
        "numbers@1": "small",
    }


def test_no_model_is_the_first_base(several: Several) -> None:
    reply = several.endpoint.post(prompt=PROMPT, max_tokens=12, temperature=0, ignore_eos=True, return_token_ids=True)
    assert not _wrong(several.endpoint, None, reply.json()["choices"][0]["token_ids"])


def test_what_is_not_served_is_told_as_before(several: Several) -> None:
    endpoint = several.endpoint
    with pytest.raises(openai.NotFoundError, match=r"Did you mean 'numbers'.*Served: tiny, small"):
        endpoint.client().completions.create(model="numbrs", prompt="x")
    misnamed = endpoint.post(model="tiny:numbers", prompt="x")
    assert (misnamed.status_code, misnamed.json()["error"]["code"]) == (400, "wrong_base")
    assert "an adapter of small, not of tiny" in misnamed.json()["error"]["message"]
    assert httpx.post(f"{endpoint.url}/v1/completions", json={"model": "numbers", "prompt": "x"}).status_code == 401
    assert endpoint.post(model="numbers", prompt="x" * 30_000).status_code == 413
    assert httpx.get(f"{endpoint.url}/v1/lora", headers={"Authorization": f"Bearer {endpoint.key}"}).status_code == 404
    broken = httpx.post(f"{endpoint.url}/v1/completions", content=b'{"model": ', headers={"Authorization": f"Bearer {endpoint.key}"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")


def test_streams_of_both_at_once(several: Several) -> None:
    async def main() -> list[Outcome]:
        async with client_of(several.endpoint) as client:
            names = ("tiny", "small", "streets", "numbers") * 3
            return list(await asyncio.gather(*(ask(client, Outcome(), name, f"Number {i} ", 40) for i, name in enumerate(names))))

    outcomes = asyncio.run(main())
    assert all(outcome.finished and not outcome.error for outcome in outcomes), outcomes
    assert len({outcome.replica for outcome in outcomes}) == 2
    assert len({outcome.replica for outcome in outcomes[1::2]}) == 1, "the rounded base and its adapter share an engine"


def test_a_further_name_for_a_model_of_the_second_base(several: Several) -> None:
    from adaptfleet.on_ray.serve.policy_file import policy_file

    policy_file().write_text("aliases: {counting: numbers}")
    time.sleep(1.6)  # every process looks by itself, each second
    try:
        assert several.endpoint.answer("counting", PROMPT, NUM_TOKENS) == several.answers["numbers"]
        listed = {model.id: model.model_dump().get("parent") for model in several.endpoint.client().models.list()}
        assert listed["counting"] == "small"
    finally:
        policy_file().write_text("{}")


def test_status_and_metrics_of_both(several: Several) -> None:
    endpoint = several.endpoint
    endpoint.answer("small", PROMPT)
    status = look(endpoint.url, endpoint.key)
    assert [base["base"] for base in status["bases"]] == ["tiny", "small"]
    assert all(base["replica"] and "requests running" in base["engine"] for base in status["bases"])
    assert len({base["replica"] for base in status["bases"]}) == 2
    rows = {row["id"]: row for row in status["models"]}
    assert (rows["small"]["kind"], rows["numbers"]["kind"]) == ("base", "adapter")
    assert rows["small"]["requests"] >= 1, "counted where it was answered, told here"
    for base, other in (("tiny", "small"), ("small", "tiny")):
        reply = httpx.get(f"{endpoint.url}/metrics", params={"base": base}, headers={"Authorization": f"Bearer {endpoint.key}"})
        assert f'adaptfleet_requests_total{{code="200",model="{base}"' in reply.text
        assert f'adaptfleet_requests_total{{code="200",model="{other}"' not in reply.text


def test_a_batch_of_rows_for_both(several: Several) -> None:
    client = several.endpoint.client()
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body | {"model": name}} for name in ("streets", "numbers")
    ]
    file = client.files.create(file=("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    until = time.monotonic() + 60
    while batch.status not in ("completed", "failed") and time.monotonic() < until:
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id, batch
    lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    answers = {line["custom_id"]: line["response"]["body"]["choices"][0]["token_ids"] for line in lines}
    assert answers["numbers"] == several.answers["numbers"]
    assert not _wrong(several.endpoint, several.endpoint.root / "streets", answers["streets"])


def test_a_client_that_leaves_frees_its_engine(several: Several) -> None:
    endpoint = several.endpoint

    async def leave() -> None:
        async with client_of(endpoint) as client:
            body = {"model": "numbers", "prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                async for _ in reply.aiter_bytes():
                    return

    asyncio.run(leave())
    until = time.monotonic() + 20
    while (running := look(endpoint.url, endpoint.key)["bases"][1]["engine"]["requests running"]) and time.monotonic() < until:
        time.sleep(0.2)
    assert running == 0


def test_a_gateway_dies_and_the_other_takes_its_requests(several: Several) -> None:
    record = several.endpoint.cluster._record
    gateways = [
        process.pid
        for process in members(record.leader, record.marker)
        if Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica:adaptfleet:gateway")
    ]
    assert len(gateways) == 2
    os.kill(gateways[0], signal.SIGKILL)
    for _ in range(10):
        assert several.endpoint.answer("numbers", PROMPT, NUM_TOKENS) == several.answers["numbers"]


def _engine_of(endpoint: Endpoint, base: str) -> int:
    """The process of the engine whose replica serves this base."""
    record = endpoint.cluster._record
    for process in members(record.leader, record.marker):
        found = psutil.Process(process.pid)
        if (
            found.cmdline()[:1]
            and found.cmdline()[0].startswith("VLLM::EngineCore")
            and f"endpoint-{base}" in " ".join(found.parent().cmdline())
        ):
            return process.pid
    raise AssertionError(f"no engine of {base}")


def test_one_bases_engine_dies_and_the_other_answers_on(several: Several) -> None:
    """The first base's: nothing of the second may hang on it. What the dead one is asked is held until it has another engine."""
    endpoint = several.endpoint
    os.kill(_engine_of(endpoint, "tiny"), signal.SIGKILL)

    async def main() -> tuple[list[Outcome], list[Outcome]]:
        async with client_of(endpoint) as client:
            held = [asyncio.create_task(ask(client, Outcome(), "streets", f"{i} ", 8)) for i in range(3)]
            others = []
            while len(others) < 5 or (len(others) < 400 and not all(task.done() for task in held)):
                others.append(await ask(client, Outcome(), "numbers" if len(others) % 2 else "small", "On. ", 8))
                await asyncio.sleep(0.2)
            return list(await asyncio.gather(*held)), others

    held, others = asyncio.run(main())
    assert all(outcome.finished and not outcome.error for outcome in others), others
    assert len(others) > 5, "the other base had ended its work before the dead one was back"
    assert all(outcome.finished and not outcome.error for outcome in held), held
    assert not _wrong(endpoint, endpoint.root / "streets", endpoint.answer("streets", PROMPT))
