"""A Serve application that says which configuration it was given, after a moment, as an engine would."""

import asyncio
import os
from typing import Any

from ray import serve

from adaptfleet.on_ray.serve.way_in import wait_for_proxy


@serve.deployment(ray_actor_options={"num_cpus": 1})
class Hello:
    async def __init__(self, word: str) -> None:  # type: ignore[misc]
        self._word = word
        await wait_for_proxy()

    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(0.1)
        return f"{self._word} from {os.environ.get('GREETING', 'a pod')}"


def app(args: dict[str, str]) -> Any:
    return Hello.bind(args["word"])
