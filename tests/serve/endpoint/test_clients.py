"""What vLLM's API gives, through the public door: OpenAI's client sync, async and streaming; tools, schemas, embeddings."""

import asyncio
import json
import math
import time
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from tests.serve.endpoint.conftest import RANKS, Collector, Endpoint
from tests.serve.tiny_llama import load_adapted

MESSAGES: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_async_streams_side_by_side_do_not_mix(endpoint: Endpoint) -> None:
    """Each adapter answers in its own way; sixty streams at once, each is compared with its own answer alone."""

    async def all_of_them() -> list[tuple[str, str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0, timeout=300) as client:

            async def stream(model: str) -> tuple[str, str, str | None]:
                text, last = "", None
                given: Any = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
                async for chunk in await client.chat.completions.create(stream=True, **given):
                    assert chunk.model == model
                    text += chunk.choices[0].delta.content or ""
                    last = chunk.choices[0].finish_reason or last
                return model, text, last

            return await asyncio.gather(*(stream(model) for model in ["tiny", *RANKS] * 15))

    alone = {}
    for model in ["tiny", *RANKS]:
        whole = endpoint.client().chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        alone[model] = whole.choices[0].message.content
    assert len(set(alone.values())) == 4
    answers = asyncio.run(all_of_them())
    # A tie of two tokens may fall otherwise in another batch; another adapter's answer never may.
    wrong = [(model, text) for model, text, _ in answers if text != alone[model] and text in alone.values()]
    assert wrong == []
    assert sum(text == alone[model] for model, text, _ in answers) >= 54
    assert {reason for _, _, reason in answers} == {"length"}


def test_json_schema_and_regex(endpoint: Endpoint) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    reply = endpoint.client().chat.completions.create(
        model="people", messages=MESSAGES, max_tokens=60, response_format=schema, temperature=0
    )
    assert 0 <= json.loads(str(reply.choices[0].message.content))["n"] <= 99
    regex = endpoint.post(model="people", prompt="x", max_tokens=20, structured_outputs={"regex": "(red|blue)-[0-9]{2}"}, temperature=0)
    assert regex.status_code == 200, regex.text
    assert regex.json()["choices"][0]["text"].partition("-")[0] in ("red", "blue")


def test_a_named_tool_is_called_with_its_arguments(endpoint: Endpoint) -> None:
    """Random weights may fill an answer with blanks to its end; of eight at a high temperature some call, and each call is right."""
    tool: Any = {"type": "function", "function": {"name": "count", "parameters": SCHEMA, "strict": True}}
    reply = endpoint.client().chat.completions.create(
        model="streets",
        messages=MESSAGES,
        max_tokens=200,
        temperature=2,
        seed=1,
        n=8,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "count"}},
    )
    calls = [call for choice in reply.choices if choice.finish_reason != "length" for call in choice.message.tool_calls or []]
    assert calls, [choice.message for choice in reply.choices]
    assert {(call.type, call.function.name) for call in calls} == {("function", "count")}
    assert all(0 <= json.loads(call.function.arguments)["n"] <= 99 for call in calls)


def test_log_probabilities_and_several_choices(endpoint: Endpoint) -> None:
    reply = endpoint.client().chat.completions.create(
        model="cities", messages=MESSAGES, max_tokens=3, n=3, logprobs=True, top_logprobs=4, seed=1, extra_body={"ignore_eos": True}
    )
    assert len(reply.choices) == 3
    for choice in reply.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [4, 4, 4]
        assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert reply.usage is not None and reply.usage.completion_tokens == 9


def test_responses_stream_and_messages_count(endpoint: Endpoint) -> None:
    events = list(endpoint.client().responses.create(model="people", input="hello", max_output_tokens=4, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    counted = endpoint.post("/v1/messages/count_tokens", model="people", messages=MESSAGES)
    assert counted.status_code == 200 and counted.json()["input_tokens"] > 0


def test_a_clients_trace_reaches_from_the_door_into_the_engine(endpoint: Endpoint, collector: Collector) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    reply = httpx.post(
        f"{endpoint.url}/v1/completions",
        json={"model": "streets", "prompt": "x", "max_tokens": 2},
        headers={"Authorization": f"Bearer {endpoint.key}", "traceparent": f"00-{trace}-b7ad6b7169203331-01"},
        timeout=60,
    )
    assert reply.status_code == 200
    deadline = time.monotonic() + 60  # spans are sent in batches, every few seconds
    while time.monotonic() < deadline:
        ours = {span.name: span for _, span in collector.spans if span.trace_id.hex() == trace}
        if {"POST /v1/completions", "llm_request"} <= set(ours):
            break
        time.sleep(0.2)
    door, engine = ours["POST /v1/completions"], ours["llm_request"]
    assert door.parent_span_id.hex() == "b7ad6b7169203331"
    assert engine.parent_span_id == door.span_id


def _pooled(endpoint: Endpoint, adapter: str | None, text: str) -> torch.Tensor:
    """The mean of the last hidden states after the final norm, by transformers."""
    model = load_adapted(endpoint.base, None if adapter is None else endpoint.root / adapter)
    ids = AutoTokenizer.from_pretrained(endpoint.base)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden_TD = model(ids, output_hidden_states=True).hidden_states[-1][0]
    return torch.nn.functional.normalize(hidden_TD.mean(0), dim=0)


@pytest.mark.parametrize("adapter", [None, "streets"])
def test_embeddings_are_the_chat_models_hidden_states(endpoint: Endpoint, adapter: str | None) -> None:
    texts = ["Where is it?", "a longer text about something else"]
    client = endpoint.client().with_options(timeout=300)  # the first one starts the embedding engine
    reply = client.embeddings.create(model=adapter or "tiny", input=texts, encoding_format="float")
    assert reply.model == (adapter or "tiny")
    assert reply.usage.prompt_tokens == sum(map(len, texts))
    for text, item in zip(texts, reply.data, strict=True):
        torch.testing.assert_close(torch.tensor(item.embedding), _pooled(endpoint, adapter, text), atol=2e-4, rtol=1e-3)
    packed = client.embeddings.create(model=adapter or "tiny", input=texts[0])  # base64, the client's default
    assert packed.data[0].embedding == pytest.approx(reply.data[0].embedding, abs=1e-5)


def test_scores_are_cosines_and_another_tenants_adapter_has_no_embeddings(endpoint: Endpoint) -> None:
    reply = endpoint.post("/v1/score", model="tiny", text_1="Where is it?", text_2=["Where is it?", "zzz 999"])
    assert reply.status_code == 200, reply.text
    same, other = (item["score"] for item in reply.json()["data"])
    expected = float(_pooled(endpoint, None, "Where is it?") @ _pooled(endpoint, None, "zzz 999"))
    assert math.isclose(same, 1, abs_tol=1e-3)
    assert math.isclose(other, expected, abs_tol=2e-3)
    assert endpoint.post("/v1/embeddings", model="nowhere", input="x").status_code == 404
    assert endpoint.post("/v1/embeddings", model="tiny").status_code == 400
    pooled = endpoint.post("/pooling", model="tiny", input="x")
    assert pooled.status_code == 200 and pooled.json()["data"]
