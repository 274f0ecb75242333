"""A Serve application that says which configuration it was given, after a moment, as an engine would."""

import asyncio
import os
from typing import Any

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 1})
class Hello:
    def __init__(self, word: str) -> None:
        self._word = word

    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(0.1)
        return f"{self._word} from {os.environ.get('GREETING', 'a pod')}"


def app(args: dict[str, str]) -> Any:
    return Hello.bind(args["word"])
