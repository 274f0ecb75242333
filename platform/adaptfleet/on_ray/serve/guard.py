"""What stands between the door and vLLM's application: too much is sent away, adapters take turns, and no answer is silently broken."""

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from typing import Any

from adaptfleet.on_ray.serve.adapters import Adapters
from adaptfleet.on_ray.serve.refusal import RefusalError, engine_died, overloaded
from adaptfleet.on_ray.serve.served_models import current
from adaptfleet.on_ray.serve.unbroken import UnbrokenAnswer
from adaptfleet.on_ray.serve.workload import Workload

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    def __init__(
        self,
        application: Callable[[Scope, Receive, Send], Awaitable[None]],
        adapters: Adapters,
        workload: Workload,
        is_engine_alive: Callable[[], bool],
        max_requests: int,
        replica: str,
    ) -> None:
        """`max_requests`: more at once are sent away. `replica` is told in the header `x-replica`."""
        self._application = application
        self._adapters = adapters
        self._workload = workload
        self._is_engine_alive = is_engine_alive
        self._max_requests = max_requests
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """RefusalError where nothing was sent; the door answers with it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._application(scope, receive, send)
            return
        if self._workload.requests >= self._max_requests:
            raise overloaded(self._workload.requests)
        self._workload.requests += 1
        try:
            now = current.get()
            async with nullcontext() if now is None or now.adapter is None else self._adapters.in_engine(now.adapter):
                await self._answered(scope, receive, UnbrokenAnswer(send, self._is_engine_alive, self._replica))
        except RefusalError as refusal:
            # Whatever it says, an adapter that a dead engine could not load is loaded by another.
            raise (refusal if self._is_engine_alive() else engine_died()) from None
        finally:
            self._workload.requests -= 1

    async def _answered(self, scope: Scope, receive: Receive, answer: UnbrokenAnswer) -> None:
        failure: Exception | None = None
        try:
            await self._application(scope, receive, answer.send)
        except Exception as error:
            failure = error
        await answer.close(failure)
