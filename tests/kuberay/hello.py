"""A Serve application that says which configuration it was given, after a moment, as an engine would."""

import asyncio
import os
import socket
import time
from typing import Any

from ray import serve

_PROXY_S = 90.0


@serve.deployment(ray_actor_options={"num_cpus": 1})
class Hello:
    def __init__(self, word: str) -> None:
        self._word = word
        _take_as_long_as_the_proxy()

    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(0.1)
        return f"{self._word} from {os.environ.get('GREETING', 'a pod')}"


def _take_as_long_as_the_proxy() -> None:
    """Serve starts a node's proxy once a replica has its place there. An engine takes longer to start than that; a replica that does not is
    ready before anything on its node takes requests, and a switch of clusters then leads to nobody."""
    port, end = int(os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"]), time.monotonic() + _PROXY_S
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    time.sleep(3.0)


def app(args: dict[str, str]) -> Any:
    return Hello.bind(args["word"])
