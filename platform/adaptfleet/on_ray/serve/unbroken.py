"""An answer comes whole, or says that it does not.

Nothing is sent before the answer's first piece of text. So a request whose engine dies before that has had no answer at all, and the
ingress sends it to another replica (502, `cluster/ingress.py`). One that has begun ends with an error event, never as if it were complete.
"""

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adaptfleet.on_ray.serve.refusal import RefusalError, engine_died

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger(__name__)


class UnbrokenAnswer:
    def __init__(self, send: Send, is_engine_alive: Callable[[], bool], replica: str) -> None:
        self._send = send
        self._is_engine_alive = is_engine_alive
        self._replica = replica
        self._start: Message | None = None
        self._has_begun = False
        self._has_ended = False
        self._is_stream = False
        self._is_lost = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # What vLLM says of a dead engine is not the answer while another replica may give one.
            self._is_lost = message["status"] >= 500 and not self._is_engine_alive()
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in message.get("headers", ())
            )
            self._start = {**message, "headers": [*message.get("headers", ()), (b"x-replica", self._replica.encode())]}
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        if not self._has_begun and self._is_stream and not self._is_engine_alive():
            self._is_lost = True
        if self._is_lost or self._has_ended or not (body or is_last or self._has_begun):
            return
        if self._is_stream and b'"error"' in body and not self._is_engine_alive():
            await self._break_off()
            return
        if self._start is not None:
            start, self._start = self._start, None
            self._has_begun = True
            await self._send(start)
        self._has_ended = is_last
        await self._send(message)

    async def _break_off(self) -> None:
        self._has_ended = True
        await self._send({"type": "http.response.body", "body": broken_off(self._is_engine_alive()), "more_body": False})

    async def close(self, error: Exception | None) -> None:
        """After the application returned, or raised. RefusalError: nothing was sent, and this is to be the answer."""
        if self._has_ended:
            return
        if error is not None:
            log.error("the application failed: %s: %s", type(error).__name__, error)
        if self._has_begun:
            if not self._is_stream:
                raise error or ConnectionError("the application left its answer unfinished")
            await self._break_off()
        elif self._is_lost or not self._is_engine_alive():
            raise engine_died()
        elif error is not None:
            raise RefusalError(500, "The request failed here; the endpoint's log says why.", "internal_error")


def broken_off(is_engine_alive: bool) -> bytes:
    """The last event of a stream that is not whole."""
    code, why = ("internal_error", "the endpoint's log says why") if is_engine_alive else ("engine_died", "its engine died")
    error = {"message": f"The answer broke off: {why}. Ask again.", "type": "server_error", "param": None, "code": code}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n"
