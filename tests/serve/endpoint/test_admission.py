"""Tenants at the real endpoint: who may name what, and who may ask how much."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.serve.endpoint.conftest import MAX_LEN, Endpoint, Tenants

PRIVATE = "tenants: {acme: {owns: ['acme-*']}, beta: {models: ['tiny', 'streets']}}\n"


def _status(endpoint: Endpoint, key: str) -> dict[str, Any]:
    return dict(httpx.get(f"{endpoint.url}/status", headers={"Authorization": f"Bearer {key}"}).json())


def _of(status: dict[str, Any], tenant: str) -> dict[str, Any]:
    return next(row for row in status["tenants"] if row["tenant"] == tenant)


def test_what_another_owns_does_not_exist(endpoint: Endpoint, tenants: Tenants) -> None:
    endpoint.publish("acme-secret", endpoint.adapter("acme-secret", seed=61))
    acme, beta, other = tenants.key("acme"), tenants.key("beta"), tenants.key("other")
    endpoint.wait_for("acme-secret")
    tenants.policies(PRIVATE)
    assert endpoint.post(key=acme, model="acme-secret", prompt="x", max_tokens=1).status_code == 200
    for key in (beta, other, endpoint.key):
        replies = {
            name: endpoint.post(key=key, model=name, prompt="x", max_tokens=1)
            for name in ("acme-secret", "acme-secret@1", "acme-secret@prod", "tiny:acme-secret", "acme-secres", "acme-never")
        }
        assert {reply.status_code for reply in replies.values()} == {404}
        known, never = (replies[name].json()["error"]["message"].replace(name, "X") for name in ("acme-secret", "acme-never"))
        assert known == never, "what is hidden is answered word by word as what never was"
        assert "acme-secret" not in replies["acme-secres"].text
        listed = {model.id for model in endpoint.client(key).models.list()}
        assert not [name for name in listed if name.startswith("acme")]
        assert not [row for row in _status(endpoint, key)["models"] if row["id"].startswith("acme")]
    assert {model.id for model in endpoint.client(beta).models.list()} == {"tiny", "streets", "streets@1", *()}
    assert endpoint.post(key=beta, model="people", prompt="x").status_code == 404
    assert {"acme-secret", "streets", "people"} <= {model.id for model in endpoint.client(acme).models.list()}
    assert httpx.get(f"{endpoint.url}/metrics/", headers={"Authorization": f"Bearer {beta}"}).status_code in (403, 404)
    assert httpx.get(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {beta}"}).status_code == 403
    assert [row["tenant"] for row in _status(endpoint, beta)["tenants"]] == ["beta"]


def test_a_keys_scope_and_names_of_ones_own(endpoint: Endpoint, tenants: Tenants) -> None:
    scoped = tenants.key("gamma", models=("people",))
    tenants.policies("aliases: {gpt-4o-mini: people, small: tiny}\ntenants: {gamma: {aliases: {mine: 'people@1'}}}")
    assert {model.id for model in endpoint.client(scoped).models.list()} == {"people", "people@1", "gpt-4o-mini", "mine"}
    for name, status in {"people": 200, "gpt-4o-mini": 200, "mine": 200, "streets": 404, "tiny": 404, "small": 404}.items():
        reply = endpoint.post(key=scoped, model=name, prompt="x", max_tokens=1)
        assert reply.status_code == status, name
        assert status != 200 or reply.json()["model"] == name
    assert endpoint.post(model="small", prompt="x", max_tokens=1).status_code == 200
    assert endpoint.post(model="mine", prompt="x", max_tokens=1).status_code == 404, "an alias of one tenant is no one else's"


def test_requests_a_minute_end_in_429_with_the_time_to_wait(endpoint: Endpoint, tenants: Tenants) -> None:
    key = tenants.key("limited")
    tenants.policies("tenants: {limited: {requests_per_min: 2}}")
    replies = [endpoint.post(key=key, model="tiny", prompt="x", max_tokens=1) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert 0 < int(replies[2].headers["retry-after"]) <= 30
    error = replies[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    with pytest.raises(openai.RateLimitError, match="2 requests a minute"):
        endpoint.client(key).completions.create(model="tiny", prompt="x")
    assert endpoint.post(model="tiny", prompt="x", max_tokens=1).status_code == 200, "nobody else is limited"
    tenants.policies("tenants: {limited: {requests_per_min: 600}}")
    assert endpoint.post(key=key, model="tiny", prompt="x", max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_the_engines_and_budgets_end(endpoint: Endpoint, tenants: Tenants, stream: bool) -> None:
    tenant = f"spender-{stream}".lower()
    key = tenants.key(tenant)
    tenants.policies(f"tenants: {{{tenant}: {{token_budget: {{tokens: 40, per: day}}}}}}")
    reply = endpoint.post(key=key, model="streets", prompt="ten bytes.", max_tokens=15, n=2, ignore_eos=True, stream=stream)
    assert reply.status_code == 200
    used = _of(_status(endpoint, key), tenant)
    assert (used["requests_today"], used["tokens_today"], used["in_flight"]) == (1, 10 + 2 * 15, 0)
    refused = endpoint.post(key=key, model="streets", prompt="x", max_tokens=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert int(refused.headers["retry-after"]) <= 86_400


def test_a_client_that_hangs_up_is_charged_and_frees_its_place(endpoint: Endpoint, tenants: Tenants) -> None:
    key = tenants.key("hasty")
    tenants.policies("tenants: {hasty: {max_concurrent: 1}}")
    # Many long answers: the first token comes long before the last.
    body = {"model": "tiny", "prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 60}
    with httpx.stream("POST", f"{endpoint.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        second = endpoint.post(key=key, model="tiny", prompt="x", max_tokens=1)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
    deadline = time.monotonic() + 30
    while _of(_status(endpoint, key), "hasty")["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    used = _of(_status(endpoint, key), "hasty")
    assert used["in_flight"] == 0
    assert 0 < used["tokens_today"] < 1 + 60 * 240
    assert endpoint.post(key=key, model="tiny", prompt="x", max_tokens=1).status_code == 200


def test_a_client_that_hangs_up_on_a_whole_answer_ends_its_generation(endpoint: Endpoint, tenants: Tenants) -> None:
    key = tenants.key("impatient")
    time.sleep(1.2)

    def running() -> float:
        return float(_status(endpoint, endpoint.key)["engine"]["requests running"])

    async def hang_up() -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 240, "ignore_eos": True, "n": 60}
        async with httpx.AsyncClient(timeout=120) as client:
            asked = client.post(f"{endpoint.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            task = asyncio.create_task(asked)
            while not await asyncio.to_thread(running):
                assert not task.done(), "it was answered before it could be broken off"
            task.cancel()
            await asyncio.wait({task})

    asyncio.run(hang_up())
    deadline = time.monotonic() + 60
    while (_of(_status(endpoint, key), "impatient")["in_flight"] or running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    used = _of(_status(endpoint, key), "impatient")
    assert used["in_flight"] == 0
    assert 0 < used["tokens_today"] < 60 * 240
    assert not running(), "the engine makes nothing for nobody"


def test_bounds_of_size_length_and_time(endpoint: Endpoint, tenants: Tenants) -> None:
    key, brief = tenants.key("bound"), tenants.key("brief")
    limits = "max_request_bytes: 600, max_output_tokens: 10, max_context_tokens: 40, max_request_s: 30"
    tenants.policies(f"tenants: {{bound: {{{limits}}}, brief: {{max_request_s: 0.001}}}}")
    assert endpoint.post(key=key, model="tiny", prompt="x" * 700).status_code == 413
    too_many = endpoint.post(key=key, model="tiny", prompt="x", max_tokens=11)
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (400, "max_output_tokens_exceeded")
    whole = endpoint.post(key=key, model="tiny", prompt="x" * 35, ignore_eos=True)
    assert whole.json()["usage"]["completion_tokens"] == 5, "cut where prompt and answer reach the bound"
    chat = endpoint.post("/v1/chat/completions", key=key, model="tiny", messages=[{"role": "user", "content": "x"}], ignore_eos=True)
    assert chat.json()["usage"]["completion_tokens"] == 10
    long = endpoint.post(key=key, model="tiny", prompt="x" * 41, max_tokens=1)
    assert long.status_code == 400
    assert "max_context_tokens" in long.json()["error"]["message"]
    late = endpoint.post(key=brief, model="tiny", prompt="x", max_tokens=100, ignore_eos=True)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
    assert endpoint.answer("tiny", num_tokens=MAX_LEN // 2)


def test_a_stream_out_of_time_ends_with_an_error(endpoint: Endpoint, tenants: Tenants) -> None:
    key = tenants.key("slow")
    tenants.policies("tenants: {slow: {max_request_s: 0.25}}")
    client = endpoint.client(key)
    with pytest.raises(openai.APIError, match="max_request_s"):
        for _ in range(20):
            for _ in client.completions.create(
                model="tiny", prompt="x", max_tokens=240, stream=True, extra_body={"ignore_eos": True, "n": 8}
            ):
                pass


def test_switched_off_expired_revoked(endpoint: Endpoint, tenants: Tenants) -> None:
    from adaptfleet.on_ray.serve.key_file import read_keys, revoke_key, sha256_of

    key = tenants.key("leaving")
    time.sleep(1.2)
    assert endpoint.post(key=key, model="tiny", prompt="x", max_tokens=1).status_code == 200
    tenants.policies("tenants: {leaving: {enabled: false}}")
    assert endpoint.post(key=key, model="tiny", prompt="x").json()["error"]["code"] == "tenant_disabled"
    tenants.policies("{}")
    revoke_key(read_keys()[sha256_of(key)].id)
    time.sleep(1.6)
    assert endpoint.post(key=key, model="tiny", prompt="x").json()["error"]["code"] == "invalid_api_key"


def test_a_flood_of_one_tenant_does_not_hold_up_another(endpoint: Endpoint, tenants: Tenants) -> None:
    """Far more than a batch holds waits in the engine's queue; the late, small tenant is not behind it."""
    keys = {tenant: tenants.key(tenant) for tenant in ("flood", "small")}
    time.sleep(1.6)
    order: list[str] = []

    async def ask(client: httpx.AsyncClient, tenant: str, i: int) -> None:
        body = {"model": "tiny", "prompt": f"{tenant} {i}", "max_tokens": 100, "ignore_eos": True, "n": 8}
        reply = await client.post(f"{endpoint.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {keys[tenant]}"})
        assert reply.status_code == 200, reply.text
        order.append(tenant)

    async def all_of_them() -> None:
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
            floods = [asyncio.create_task(ask(client, "flood", i)) for i in range(48)]
            while "flood" not in order:  # the first ones are done, and far more wait
                await asyncio.sleep(0.02)
            await asyncio.gather(*floods, *(ask(client, "small", i) for i in range(4)))

    asyncio.run(all_of_them())
    assert len(order) - order[::-1].index("small") < len(order) * 3 // 4, order


def test_the_audit_log_holds_no_prompt_and_no_key(endpoint: Endpoint, tenants: Tenants) -> None:
    key = tenants.key("audited")
    time.sleep(1.2)
    reply = httpx.post(
        f"{endpoint.url}/v1/completions",
        json={"model": "streets", "prompt": "a very secret prompt", "max_tokens": 3, "ignore_eos": True},
        headers={"Authorization": f"Bearer {key}", "X-Request-Id": "my-request-77"},
        timeout=60,
    )
    assert reply.headers.get_list("x-request-id") == ["my-request-77"]
    endpoint.post(key="wrong-key-of-enough-length", model="tiny", prompt="x")
    text = "".join(file.read_text() for file in (endpoint.root / "home" / "logs" / "audit").iterdir())
    lines = [json.loads(line) for line in text.splitlines()]
    (line,) = [line for line in lines if line["request_id"] == "my-request-77"]
    assert (line["tenant"], line["model"], line["status"], line["prompt_tokens"], line["output_tokens"]) == (
        "audited",
        "streets@1",
        200,
        20,
        3,
    )
    assert [entry for entry in lines if entry["status"] == 401 and entry["refused"] == "invalid_api_key"]
    assert "secret prompt" not in text
    assert key not in text and "wrong-key" not in text
    unsafe = httpx.get(f"{endpoint.url}/v1/models", headers={"Authorization": f"Bearer {key}", "X-Request-Id": "a b {}"})
    assert set(unsafe.headers.get_list("x-request-id")) > {"a b {}"}, "one that may stand in logs is beside it"
