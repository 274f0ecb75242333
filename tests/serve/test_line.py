"""A client's line is cut where the call is cancelled or out of time: what listens for hang-ups, as vLLM's handlers do, then ends."""

import asyncio
from typing import Any

import pytest

from adaptfleet.on_ray.serve.line import Line

SCOPE: dict[str, Any] = {"type": "http"}


class Handler:
    """Works in a task of its own until it is done or the client hangs up, as `vllm.entrypoints...with_cancellation` does."""

    def __init__(self, takes_s: float) -> None:
        self._takes_s = takes_s
        self.ended = "not begun"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"asked"
        await send({"type": "http.response.start"})
        work = asyncio.create_task(self._work())
        listening = asyncio.create_task(self._listen(receive))
        await asyncio.wait({work, listening}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, listening):
            task.cancel()
        await send({"type": "http.response.body"})

    async def _work(self) -> None:
        try:
            await asyncio.sleep(self._takes_s)
            self.ended = "whole"
        except asyncio.CancelledError:
            self.ended = "broken off"

    async def _listen(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


async def _never() -> Any:
    await asyncio.Event().wait()


def _run(
    handler: Any, receive: Any = _never, within_s: float | None = None, cancelled_after_s: float | None = None
) -> tuple[Any, list[str]]:
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def run() -> Any:
        call = asyncio.create_task(Line(b"asked", receive).serve(handler, SCOPE, send, within_s))
        if cancelled_after_s is not None:
            await asyncio.sleep(cancelled_after_s)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            return "cancelled"
        return await call

    return asyncio.run(run()), sent


def test_an_answer_goes_through() -> None:
    handler = Handler(0.01)
    assert _run(handler) == (True, ["http.response.start", "http.response.body"])
    assert handler.ended == "whole"


def test_out_of_time_and_cancelled_end_the_work_and_say_nothing_more() -> None:
    for given in ({"within_s": 0.05}, {"cancelled_after_s": 0.05}):
        handler = Handler(3600)
        result, sent = _run(handler, **given)  # type: ignore[arg-type]
        assert result in (False, "cancelled")
        assert handler.ended == "broken off"
        assert sent == ["http.response.start"]


def test_a_client_that_hangs_up_itself() -> None:
    async def gone() -> Any:
        return {"type": "http.disconnect"}

    handler = Handler(3600)
    result, sent = _run(handler, gone)
    assert result is True
    assert handler.ended == "broken off"
    assert sent == ["http.response.start"], "what vLLM says to nobody is not sent"


def test_who_hangs_up_after_a_whole_answer_is_not_gone() -> None:
    async def run(answers_first: bool) -> bool:
        async def gone() -> Any:
            return {"type": "http.disconnect"}

        async def application(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            if answers_first:
                await send({"type": "http.response.body", "body": b"x"})
            assert (await receive())["type"] == "http.disconnect"

        async def send(message: Any) -> None:
            return

        line = Line(b"asked", gone)
        await line.serve(application, SCOPE, send)
        return line.is_gone

    assert asyncio.run(run(answers_first=False))
    assert not asyncio.run(run(answers_first=True))


def test_what_the_application_raises_is_raised() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _run(fails)


def test_one_that_does_not_listen_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.line._NOTICED_WITHIN_S", 0.05)

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(3600)

    assert _run(deaf, within_s=0.01) == (False, [])
