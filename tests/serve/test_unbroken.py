"""Every way an answer can end when its engine dies."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.on_ray.serve.unbroken import UnbrokenAnswer

Sent = list[dict[str, Any]]


def _start(status: int = 200, kind: bytes = b"text/event-stream; charset=utf-8") -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def _body(text: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


def _run(
    application: Callable[[Callable[[Any], Awaitable[None]]], Awaitable[None]], alive: bool, dies_after: int = -1
) -> tuple[Sent, RefusalError | None]:
    """`dies_after`: so many messages were sent to the client."""
    sent: Sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def main() -> RefusalError | None:
        answer = UnbrokenAnswer(send, lambda: alive and len(sent) != dies_after, "r1")
        failure = None
        try:
            await application(answer.send)
        except Exception as error:
            failure = error
        try:
            await answer.close(failure)
        except RefusalError as refusal:
            return refusal
        return None

    return sent, asyncio.run(main())


def test_a_whole_answer_passes_as_it_is() -> None:
    messages = [_start(), _body(b"data: 1\n\n"), _body(b"data: [DONE]\n\n"), _body(b"", more=False)]

    async def application(send: Any) -> None:
        for message in messages:
            await send(message)

    sent, refusal = _run(application, alive=True)
    assert refusal is None
    assert sent[0] == {**messages[0], "headers": [*messages[0]["headers"], (b"x-replica", b"r1")]}
    assert sent[1:] == messages[1:]


def test_nothing_is_sent_before_the_first_token() -> None:
    async def application(send: Any) -> None:
        await send(_start())
        await send(_body(b""))
        raise ConnectionError("engine gone")

    sent, refusal = _run(application, alive=False)
    assert sent == []
    assert refusal is not None
    assert (refusal.status, refusal.code) == (502, "engine_died")


def test_vllms_own_words_for_a_dead_engine_are_not_sent() -> None:
    async def application(send: Any) -> None:
        await send(_start(500, b"application/json"))
        await send(_body(b'{"error": "EngineCore encountered an issue at /usr/lib/..."}', more=False))

    sent, refusal = _run(application, alive=False)
    assert sent == []
    assert refusal is not None
    assert refusal.status == 502
    passed, none = _run(application, alive=True)
    assert [message["type"] for message in passed] == ["http.response.start", "http.response.body"]
    assert none is None


def test_vllms_error_event_is_no_first_token() -> None:
    """A stream has its status before its first token: vLLM can only say in the stream that its engine is dead."""

    async def application(send: Any) -> None:
        await send(_start())
        await send(_body(b'data: {"error": {"message": "EngineCore encountered an issue"}}\n\n'))
        await send(_body(b"data: [DONE]\n\n", more=False))

    sent, refusal = _run(application, alive=False)
    assert sent == []
    assert refusal is not None
    assert refusal.status == 502
    assert len(_run(application, alive=True)[0]) == 3, "an error of a living engine is the answer"


def test_a_whole_answer_is_given_though_the_engine_died_since() -> None:
    async def application(send: Any) -> None:
        await send(_start(200, b"application/json"))
        await send(_body(b'{"choices": []}', more=False))

    sent, refusal = _run(application, alive=False)
    assert refusal is None
    assert sent[1]["body"] == b'{"choices": []}'


@pytest.mark.parametrize("says", ["vllm", "nothing"])
def test_a_stream_that_began_ends_with_an_error_event(says: str) -> None:
    async def application(send: Any) -> None:
        await send(_start())
        await send(_body(b"data: {}\n\n"))
        if says == "nothing":
            raise ConnectionError("engine gone")
        await send(_body(b'data: {"error": {"message": "EngineCore: see the stack trace"}}\n\n'))
        await send(_body(b"data: [DONE]\n\n"))
        await send(_body(b"", more=False))

    sent, refusal = _run(application, alive=True, dies_after=2)
    assert refusal is None
    assert len(sent) == 3
    assert sent[-1]["more_body"] is False
    event, done = sent[-1]["body"].decode().split("\n\n")[:2]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "engine_died"
    assert done == "data: [DONE]"


def test_a_failure_with_a_living_engine_tells_nothing_of_the_inside() -> None:
    async def application(send: Any) -> None:
        raise ValueError("/srv/secret.py line 3")

    sent, refusal = _run(application, alive=True)
    assert sent == []
    assert refusal is not None
    assert refusal.status == 500
    assert "secret" not in refusal.message


def test_an_answer_of_no_stream_that_breaks_off_is_not_completed() -> None:
    async def application(send: Any) -> None:
        await send(_start(200, b"application/json"))
        await send(_body(b'{"choi'))
        raise ConnectionError("engine gone")

    with pytest.raises(ConnectionError):
        _run(application, alive=True)
