"""The way in to a replica's node: Serve starts a proxy on every node that has a replica, a little after it.

KubeRay moves a RayService's traffic to a new cluster once all its applications run, whether or not a proxy listens there
(`rayservice_controller.go`, `getAndCheckServeStatus`). So a replica counts as running only when its own node can be reached.
"""

import asyncio
import logging
from typing import Any

from ray.serve._private.constants import RAY_SERVE_WORKER_PROXY_HTTP_PORT
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

log = logging.getLogger("ray.serve")


async def wait_for_proxy(patience_s: float = 60.0) -> None:
    """Returns when this node's proxy takes connections. Where none comes in time, the log says so."""
    client: Any = await asyncio.to_thread(_get_global_client)
    controller = client._controller
    if await controller.get_proxy_location.remote() != ProxyLocation.EveryNode:
        return
    options = await controller.get_http_config.remote()
    host = options.host
    host = "127.0.0.1" if host in ("0.0.0.0", "localhost") else host
    port = RAY_SERVE_WORKER_PROXY_HTTP_PORT or options.port  # the head has no such variable
    try:
        async with asyncio.timeout(patience_s):
            while not await _listens(host, port):
                await asyncio.sleep(0.2)
    except TimeoutError:
        log.warning("no proxy listens at %s:%d after %.0f s; requests come by other nodes", host, port, patience_s)


async def _listens(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True
