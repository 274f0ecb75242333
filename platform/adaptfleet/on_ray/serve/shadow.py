"""Copies of requests to a shadow version: after the answer, at the lowest priority, few at a time. What they answer goes nowhere."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import Counter

from adaptfleet.on_ray.serve.api_keys import Caller

_MAX_IN_FLIGHT = 4

copies_total = Counter(
    "adaptfleet_shadow_copies_total", "Copies of requests to shadow versions, by what became of them.", ("model", "outcome")
)

log = logging.getLogger(__name__)


class Shadows:
    def __init__(self, inside: Callable[[Caller, str, bytes, str], Awaitable[tuple[int, bytes]]]) -> None:
        self._inside = inside
        self._running: set[asyncio.Task[None]] = set()

    def copy(self, caller: Caller, path: str, request: dict[str, Any], model: str) -> None:
        """Under load copies are left out and counted, not queued."""
        if len(self._running) >= _MAX_IN_FLIGHT:
            copies_total.labels(model, "left out").inc()
            return
        copied = {key: value for key, value in request.items() if key != "stream_options"} | {"model": model, "stream": False}
        task = asyncio.get_running_loop().create_task(self._send(caller, path, json.dumps(copied).encode(), model))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _send(self, caller: Caller, path: str, body: bytes, model: str) -> None:
        try:
            status, _ = await self._inside(caller, path, body, "shadow")
            copies_total.labels(model, "answered" if status < 400 else "failed").inc()
        except Exception:
            copies_total.labels(model, "failed").inc()
            log.exception("a copy to the shadow %s failed", model)
