"""An HTTP server in a replica's own event loop: a token takes no hop between threads here either."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import ray
import uvicorn
from ray.serve.context import _get_global_client

from adaptfleet.contracts.errors import ServingError
from adaptfleet.on_ray.serve.asgi import Application

KEEP_ALIVE_S = 75
"""Longer than the gateway keeps a connection that it does not use: a request never meets one that is being closed."""
_LEAVING_S = 1.0
"""Until every gateway has heard that the replica is to go."""
_LOOPBACK = ("127.0.0.1", "localhost")


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the replica's."""
        yield


class Listener:
    def __init__(self, server: _Server, serving: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._serving = serving
        self.address = address
        """`host:port`, as other nodes reach it."""

    @classmethod
    async def open(cls, application: Application, port: int = 0, lifespan: Literal["on", "off"] = "on") -> "Listener":
        """Takes connections when this returns. Port 0: one that the system gives. ServingError, or OSError where the port is taken."""
        bound, told = await _hosts()
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a replica that ended do not hold its port
        opened.bind((bound, port))
        opened.listen()  # two sockets may be bound to one port while neither listens
        options: dict[str, Any] = {
            "log_config": None,
            "access_log": False,
            "lifespan": lifespan,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "ws": "none",
        }
        server = _Server(uvicorn.Config(application, loop="none", **options))
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[opened]))
        while not server.started:
            if serving.done():
                raise ServingError(f"the replica's HTTP server did not start: {serving.exception()}")
            await asyncio.sleep(0.01)
        return cls(server, serving, f"{told}:{opened.getsockname()[1]}")

    async def closed(self) -> None:
        """When it listens no more."""
        await self._serving

    async def close(self) -> None:
        """Ends when the requests have ended that it had."""
        await asyncio.sleep(_LEAVING_S)
        self._server.should_exit = True
        await self._serving


async def _hosts() -> tuple[str, str]:
    """Where to listen and what to tell. Where Serve itself listens on loopback, so does this, as long as there is one node."""
    client: Any = await asyncio.to_thread(_get_global_client)
    options = await client._controller.get_http_config.remote()
    num_nodes = await asyncio.to_thread(lambda: sum(node["Alive"] for node in ray.nodes()))
    if options.host in _LOOPBACK and num_nodes == 1:
        return "127.0.0.1", "127.0.0.1"
    address = ray.util.get_node_ip_address()
    return address, address
