"""The line to a client, which the door may cut: vLLM ends what it does for a client that hung up, and for nothing else.

vLLM's handlers run in tasks of their own and listen for `http.disconnect`. Cancelling the call from outside, as Serve does when a client is
gone, would leave such a task generating to its end for nobody. So the door hangs up in the client's place and waits until vLLM has noticed.
"""

import asyncio

from adaptfleet.on_ray.serve.asgi import Application, Message, Receive, Scope, Send

_NOTICED_WITHIN_S = 5.0


class Line:
    def __init__(self, body: bytes, receive: Receive) -> None:
        """The body again, which has been read already, then whatever comes after it."""
        self._body: bytes | None = body
        self._receive = receive
        self._cut = asyncio.Event()
        self._is_whole = False
        self._hung_up = False

    @property
    def is_gone(self) -> bool:
        """The client hung up before its answer was whole."""
        return self._hung_up and not self._is_whole

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        waiting = [asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._cut.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._cut.is_set():
                return {"type": "http.disconnect"}
            message: Message = waiting[0].result()  # type: ignore[assignment]
            if message["type"] == "http.disconnect":
                self._hung_up = True
            return message
        finally:
            for task in waiting:
                task.cancel()

    async def serve(self, application: Application, scope: Scope, send: Send, within_s: float | None = None) -> bool:
        """Whether the application ended by itself within the time. Where it does not, and where this call is cancelled, the line is cut."""
        work: asyncio.Task[None] = asyncio.get_running_loop().create_task(application(scope, self.receive, self._unless_cut(send)))  # type: ignore[arg-type]
        try:
            done, _ = await asyncio.wait({work}, timeout=within_s)
        except asyncio.CancelledError:
            await self._end(work)
            raise
        if not done:
            await self._end(work)
            return False
        work.result()
        return True

    async def _end(self, work: "asyncio.Task[None]") -> None:
        self._cut.set()
        _, pending = await asyncio.wait({work}, timeout=_NOTICED_WITHIN_S)
        for task in pending:
            task.cancel()
        if not pending and not work.cancelled():
            work.exception()  # what it says about a client that is gone is no news

    def _unless_cut(self, send: Send) -> Send:
        """What vLLM says to a client that is gone is not said."""

        async def forward(message: Message) -> None:
            if self._cut.is_set() or self.is_gone:
                return
            self._is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        return forward
