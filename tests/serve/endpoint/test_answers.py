"""What the endpoint answers, under which names, and what its operators see; asked over HTTP with OpenAI's own client."""

import concurrent.futures
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.serve.endpoint.conftest import RANKS, Endpoint
from tests.serve.greedy import disagreements
from tests.serve.tiny_llama import load_adapted


def _wrong(endpoint: Endpoint, adapter: Path | None, prompt: str, answer: list[int]) -> list[str]:
    ids = AutoTokenizer.from_pretrained(endpoint.base)(prompt).input_ids
    return disagreements(load_adapted(endpoint.base, adapter), ids, answer)


# what is served, and under which names


def test_chat_completion_and_stream_with_usage(endpoint: Endpoint) -> None:
    client = endpoint.client()
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="streets", messages=messages, max_tokens=8, temperature=0)
    assert whole.model == "streets"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    text, usage, models = "", None, set()
    for chunk in client.chat.completions.create(
        model="streets", messages=messages, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        models.add(chunk.model)
        usage = chunk.usage or usage
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == 8
    assert models == {"streets"}


def test_other_apis_of_vllm(endpoint: Endpoint) -> None:
    client = endpoint.client()
    assert client.responses.create(model="people", input="hello", max_output_tokens=4).model == "people"
    message = endpoint.post("/v1/messages", model="people", max_tokens=4, messages=[{"role": "user", "content": "hello"}])
    assert (message.status_code, message.json()["model"]) == (200, "people")
    tokens = endpoint.post("/tokenize", model="people", prompt="hello").json()["tokens"]
    assert endpoint.post("/detokenize", model="people", tokens=tokens).json()["prompt"] == "hello"


@pytest.mark.parametrize("name", ["streets", "streets@1", "streets@prod", "tiny:streets", "tiny:streets@1"])
def test_every_form_of_a_name_is_the_same_adapter(endpoint: Endpoint, name: str) -> None:
    assert not _wrong(endpoint, endpoint.root / "streets", "Where is it? ", endpoint.answer(name))
    assert endpoint.answer(name) != endpoint.answer("tiny")


def test_models_lists_the_base_and_every_published_adapter(endpoint: Endpoint) -> None:
    endpoint.publish("streets-canary-only", endpoint.adapter("canary-only", seed=21), alias="canary")
    time.sleep(0.5)
    ids = [model.id for model in endpoint.client().models.list()]
    assert ids[0] == "tiny"
    assert {"streets", "streets@1", "people", "cities", "streets-canary-only@canary", "streets-canary-only@1"} <= set(ids)
    assert "streets-canary-only" not in ids, "a bare name is its alias prod"


def test_a_missing_model_is_the_base(endpoint: Endpoint) -> None:
    assert endpoint.post(prompt="x", max_tokens=1).json()["model"] == "tiny"


# parity


def test_greedy_answers_alone_and_in_concurrent_mixed_batches(endpoint: Endpoint) -> None:
    asked = [(name, f"Number {i}, or {i * i}: " + "word " * (i % 4 * 8)) for i, name in enumerate(["tiny", *RANKS] * 4)]
    alone = [endpoint.answer(name, prompt) for name, prompt in asked[:4]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda ask: endpoint.answer(*ask), asked))
    wrong: list[str] = []
    for (name, prompt), answer in [*zip(asked[:4], alone, strict=True), *zip(asked, together, strict=True)]:
        wrong += _wrong(endpoint, None if name == "tiny" else endpoint.root / name, prompt, answer)
    assert not wrong, "\n".join(wrong)


# a moving registry


def test_publishing_while_requests_are_in_flight(endpoint: Endpoint, record_property: Callable[[str, object], None]) -> None:
    stop, failures, num_done = threading.Event(), [], [0]

    def keep_asking(model: str) -> None:
        while not stop.is_set():
            reply = endpoint.post(model=model, prompt="go on", max_tokens=16, temperature=0)
            num_done[0] += 1
            if reply.status_code != 200:
                failures.append(reply.text)

    threads = [threading.Thread(target=keep_asking, args=(model,)) for model in ["tiny", *RANKS]]
    for thread in threads:
        thread.start()
    try:
        for seed in range(3):
            folder = endpoint.adapter(f"fresh-{seed}", seed=30 + seed)
            endpoint.publish(f"fresh-{seed}", folder)
            published = time.monotonic()
            reply = endpoint.post(model=f"fresh-{seed}", prompt="Where is it? ", max_tokens=1)
            while reply.status_code == 404 and time.monotonic() - published < 60:
                reply = endpoint.post(model=f"fresh-{seed}", prompt="Where is it? ", max_tokens=1)
            record_property(f"publish_to_first_answer_s_{seed}", round(time.monotonic() - published, 2))
            assert reply.status_code == 200, reply.text
            assert not _wrong(endpoint, folder, "Where is it? ", endpoint.answer(f"fresh-{seed}"))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert num_done[0] > 4


def test_promotion_and_rollback_take_effect_without_stale_weights(endpoint: Endpoint) -> None:
    from adaptfleet.store.registry import Registry

    first, second = endpoint.adapter("moving-1", seed=41), endpoint.adapter("moving-2", rank=16, seed=42)
    endpoint.publish("moving", first)
    prompt = "The same long prompt, so that a cached prefix would be used again if versions shared one. " * 2
    endpoint.wait_for("moving@1")
    before = endpoint.answer("moving", prompt)
    assert not _wrong(endpoint, first, prompt, before)
    endpoint.publish("moving", second, alias="canary")
    endpoint.wait_for("moving@canary")
    assert endpoint.answer("moving", prompt) == before
    assert not _wrong(endpoint, second, prompt, endpoint.answer("moving@canary", prompt))
    Registry.open().set_alias("moving", "prod", 2)
    time.sleep(1)
    after = endpoint.answer("moving", prompt)
    assert after != before
    assert not _wrong(endpoint, second, prompt, after)
    Registry.open().rollback("moving")
    time.sleep(1)
    assert endpoint.answer("moving", prompt) == before


# what operators see


def test_metrics_by_model_tenant_and_code(endpoint: Endpoint) -> None:
    endpoint.post(model="streets", prompt="x", max_tokens=2)
    endpoint.post(model="nowhere-to-be-found", prompt="x")
    list(endpoint.client().completions.create(model="people", prompt="x", max_tokens=2, stream=True))
    text = httpx.get(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {endpoint.key}"}, follow_redirects=True).text
    assert 'adaptfleet_requests_total{code="200",model="streets@1",tenant="default"}' in text
    assert 'adaptfleet_errors_total{code="404",model="unknown",tenant="default"}' in text
    assert 'adaptfleet_request_duration_seconds_count{code="200",model="streets@1",tenant="default"}' in text
    assert 'adaptfleet_time_to_first_token_seconds_count{code="200",model="people@1",tenant="default"}' in text
    assert "vllm:" in text
    assert "nowhere-to-be-found" not in text, "clients' texts are no labels"


def test_a_replicas_metrics_have_a_port_and_nothing_else_is_there(endpoint: Endpoint) -> None:
    own = f"http://127.0.0.1:{endpoint.spec.metrics_port}"
    key = {"Authorization": f"Bearer {endpoint.key}"}
    assert "vllm:num_requests_running" in httpx.get(f"{own}/metrics", headers=key).text
    assert httpx.get(f"{own}/metrics").status_code == 401
    for path in ("/", "/health", "/v1/models"):
        assert httpx.get(f"{own}{path}", headers=key).status_code == 404
    assert httpx.post(f"{own}/v1/completions", headers=key, json={"model": "tiny", "prompt": "x"}).status_code == 404


def test_the_key_file_is_private_and_the_key_is_nowhere_else(endpoint: Endpoint) -> None:
    file = endpoint.root / "home" / "client-key"
    for private in (file, file.with_name("api-keys")):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    copies = [path for path in endpoint.root.rglob("*") if path.is_file() and path != file and endpoint.key.encode() in path.read_bytes()]
    assert not copies


def test_a_new_tenant_needs_no_restart(endpoint: Endpoint) -> None:
    file = endpoint.root / "home" / "api-keys"
    before = file.read_text()
    file.write_text(before + "second:another-key-of-enough-length\n")
    try:
        time.sleep(1.5)
        assert endpoint.post(key="another-key-of-enough-length", model="tiny", prompt="x", max_tokens=1).status_code == 200
    finally:
        file.write_text(before)
    time.sleep(1.5)
    assert endpoint.post(key="another-key-of-enough-length", model="tiny", prompt="x").status_code == 401
