"""The endpoint's other bases, as one base's replica asks them: for what the house does by itself, never on a client's request's path."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from adaptfleet.on_ray.serve.api_keys import Caller
from adaptfleet.on_ray.serve.bases import deployment_name
from adaptfleet.on_ray.serve.refusal import unavailable
from adaptfleet.on_ray.serve.routing import Wanted

_STATUS_WITHIN_S = 3.0
_SEEN_FOR_S = 1.0

log = logging.getLogger(__name__)


class Running:
    """Which bases have a replica now, as Serve's controller says. Asking a base itself would start one that sleeps."""

    def __init__(self, base_ids: Sequence[str], application: str) -> None:
        self._base_ids = tuple(base_ids)
        self._application = application
        self._seen: list[str] = []
        self._seen_until = 0.0

    async def now(self) -> list[str]:
        """Their ids, in the endpoint's order; at most a second old."""
        if time.monotonic() >= self._seen_until:
            self._seen_until = time.monotonic() + _SEEN_FOR_S
            try:
                self._seen = await asyncio.to_thread(self._look)
            except (ray.exceptions.RayError, RayServeException) as error:
                log.warning("Serve's controller does not say who runs, what it last said is used: %s", type(error).__name__)
        return self._seen

    def _look(self) -> list[str]:
        application = serve.status().applications.get(self._application)
        parts = {} if application is None else application.deployments
        running = {name for name, part in parts.items() if part.replica_states.get(ReplicaState.RUNNING, 0)}
        return [base_id for base_id in self._base_ids if deployment_name(base_id) in running]


class Siblings:
    def __init__(self, own: str, base_ids: Sequence[str]) -> None:
        """`base_ids`: of all bases, this one's too."""
        self._own = own
        self._base_ids = tuple(base_ids)
        self._application = serve.get_replica_context().app_name
        self._running = Running(base_ids, self._application)
        self._handles: dict[str, DeploymentHandle] = {}

    async def inside(self, base: str, caller: Caller, path: str, body: bytes, klass: str) -> tuple[int, bytes]:
        """`Door.inside` of a replica of that base; where none can be asked, a 503."""
        try:
            status, answer = await self._handle(base).inside.remote(Wanted(_model(body)), caller, path, body, klass)
            return int(status), bytes(answer)
        except (ray.exceptions.RayError, RayServeException) as error:
            log.warning("%s cannot be asked: %s", base, type(error).__name__)
            refusal = unavailable(base)
            return refusal.status, refusal.body()

    async def status(self, caller: Caller) -> list[dict[str, Any]]:
        """`Status.here` of one replica of each other base; of those that have none, their id alone."""
        running = await self._running.now()
        return list(await asyncio.gather(*(self._status(base, caller, base in running) for base in self._base_ids if base != self._own)))

    async def _status(self, base: str, caller: Caller, is_running: bool) -> dict[str, Any]:
        if is_running:
            try:
                async with asyncio.timeout(_STATUS_WITHIN_S):
                    return dict(await self._handle(base).status.remote(Wanted(None), caller))
            except (TimeoutError, ray.exceptions.RayError, RayServeException) as error:
                log.warning("%s does not tell its status: %s", base, type(error).__name__)
        return {"base": base, "replica": "", "engine": {}, "counted": {}}

    def _handle(self, base: str) -> DeploymentHandle:
        if base not in self._handles:
            self._handles[base] = serve.get_deployment_handle(deployment_name(base), self._application)
        return self._handles[base]


def _model(body: bytes) -> str | None:
    """The adapter's name as far as routing cares; the base's own id is an adapter that nobody holds."""
    model = json.loads(body).get("model")
    return model.rpartition(":")[2].partition("@")[0] if isinstance(model, str) else None
