"""A canary, its rollback and a shadow at the real endpoint, with adapters whose answers differ."""

import time

import httpx

from tests.serve.endpoint.conftest import Endpoint


def test_a_canary_by_weight_sticky_by_user_and_back(endpoint: Endpoint) -> None:
    from adaptfleet.store.registry import Registry

    registry = Registry.open()
    endpoint.publish("split", endpoint.adapter("split-1", seed=71))
    endpoint.publish("split", endpoint.adapter("split-2", seed=72), alias=None)
    endpoint.wait_for("split@2")

    def ask(user: str | None) -> list[int]:
        given = {} if user is None else {"user": user}
        reply = endpoint.post(model="split", prompt="Where? ", max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True, **given)
        assert reply.json()["model"] == "split"
        return list(reply.json()["choices"][0]["token_ids"])

    one, two = endpoint.answer("split@1", "Where? ", 8), endpoint.answer("split@2", "Where? ", 8)
    assert one != two
    users = [f"user-{i}" for i in range(24)]
    assert [ask(user) for user in users[:6]] == [one] * 6
    registry.split("split", {1: 50, 2: 50})
    time.sleep(1)
    first = [ask(user) for user in users]
    assert 4 <= first.count(two) <= 20
    assert first.count(one) + first.count(two) == 24
    assert [ask(user) for user in users] == first, "a user stays where he is"
    assert len({tuple(ask(None)) for _ in range(4)}) == 1, "without a user, the key is one"
    assert endpoint.answer("split@1", "Where? ", 8) == one, "a version is a version"
    registry.rollback("split")
    time.sleep(1)
    assert [ask(user) for user in users] == [one] * 24


def test_a_shadow_gets_copies_and_answers_nobody(endpoint: Endpoint) -> None:
    from adaptfleet.store.registry import Registry

    registry = Registry.open()
    endpoint.publish("shadowed", endpoint.adapter("shadowed-1", seed=73))
    endpoint.publish("shadowed", endpoint.adapter("shadowed-2", seed=74), alias=None)
    endpoint.wait_for("shadowed@2")
    alone = endpoint.answer("shadowed@1")
    registry.split("shadowed", {}, shadow=2)
    time.sleep(1)
    assert endpoint.answer("shadowed") == alone
    for chunk in endpoint.client().completions.create(model="shadowed", prompt="x", max_tokens=4, stream=True):
        assert chunk.model == "shadowed"
    wanted = 'adaptfleet_shadow_copies_total{model="shadowed@2",outcome="answered"} 2.0'
    deadline = time.monotonic() + 60
    text = ""
    while wanted not in text and time.monotonic() < deadline:
        time.sleep(0.1)
        text = httpx.get(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {endpoint.key}"}, follow_redirects=True).text
    assert wanted in text
    assert 'adaptfleet_requests_total{code="200",model="shadowed@2",tenant="shadow"} 2.0' in text
    assert 'adaptfleet_tokens_total{kind="output",model="shadowed@1",tenant="default"}' in text
    registry.rollback("shadowed")
