"""Where the gateway sends a request: the replica of a base that the routing policy takes, and its address."""

import asyncio
import logging
import time

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from adaptfleet.on_ray.serve.refusal import unavailable
from adaptfleet.on_ray.serve.routing import Wanted

_PATIENCE_S = 1.0
_PAUSE_S = 0.2
HELD_S = 600.0
"""A request waits for so long where its base has no replica: an engine may have to start, and a node before it."""
_REMEMBERED = 256

log = logging.getLogger(__name__)


class Places:
    """Of one base's replicas. An address is asked of its replica once; after that, a choice takes no message to anybody."""

    def __init__(self, base: str, handle: DeploymentHandle) -> None:
        self._base = base
        self._handle = handle
        self._addresses: dict[str, str] = {}

    async def find(self, wanted: Wanted) -> tuple[str, str]:
        """The id and the address of a replica; waits where none runs. RefusalError: none has come."""
        until = time.monotonic() + HELD_S
        while time.monotonic() < until:
            replica = await self._chosen(wanted)
            if replica is not None and replica in self._addresses:
                return replica, self._addresses[replica]
            try:
                # Where there is no replica this waits for one, and Serve's autoscaler sees that it does.
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    replica, address = await self._handle.place.remote(wanted)
            except (ray.exceptions.RayError, RayServeException) as error:
                log.info("a replica of %s could not be asked for its address: %s", self._base, type(error).__name__)
                await asyncio.sleep(_PAUSE_S)
                continue
            except TimeoutError:
                break
            if len(self._addresses) >= _REMEMBERED:
                self._addresses.pop(next(iter(self._addresses)))
            self._addresses[replica] = address
            return replica, address
        raise unavailable(self._base)

    async def _chosen(self, wanted: Wanted) -> str | None:
        try:
            async with asyncio.timeout(_PATIENCE_S), self._handle.choose_replica(wanted, _reserve=False) as selection:
                return str(selection._replica.replica_id.unique_id)
        except (TimeoutError, RayServeException):
            return None
