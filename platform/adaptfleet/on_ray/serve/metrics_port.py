"""A replica's own `/metrics` at a port of its node. A scrape by way of the endpoint is a request to the deployment: it wakes an engine that
sleeps, keeps one awake, and may be answered by another node's."""

import asyncio
import errno
import logging

from adaptfleet.on_ray.serve.asgi import Application, Receive, Scope, Send, refuse
from adaptfleet.on_ray.serve.listener import Listener
from adaptfleet.on_ray.serve.refusal import RefusalError

log = logging.getLogger("ray.serve")
_RETRY_S = 2.0


async def serve_metrics(door: Application, port: int) -> None:
    """Until it is cancelled. A port that another replica of this node has is waited for: one on its way out gives it back."""
    has_said = False
    while True:
        try:
            listener = await Listener.open(_MetricsAlone(door), port, lifespan="off")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if not has_said:
                log.warning(
                    "metrics_port %d of this node is taken: until it is free, /metrics of this replica are at the endpoint alone.", port
                )
            has_said = True
            await asyncio.sleep(_RETRY_S)
        else:
            return await listener.closed()


class _MetricsAlone:
    """The door's `/metrics`, with its check of the key, and nothing else of it."""

    def __init__(self, door: Application) -> None:
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            await self._door(scope, receive, send)
        else:
            await refuse(send, RefusalError(404, "This port has /metrics alone; requests go to the endpoint.", "not_found"))
