"""Serve's side of routing: HAProxy asks `/internal/route` where a request is to go, and sends it to that replica itself.

The answer's tokens never pass through here. Hooks of Ray 2.60: `Application._with_ingress_request_router`,
`DeploymentHandle.choose_replica` without reservation, the reply's `replica_id` (`serve/_private/ingress_request_router.lua.tmpl`). While
no replica runs, the answer names none, and HAProxy gives the request to Serve's own proxy, which holds it until one has started.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.names import Reference
from adaptfleet.on_ray.serve.routing import RecentPrefixes, Replica, Wanted, choose, prefixes, still_there

ROUTER = "router"
_NOBODY = "none"
_PATIENCE_S = 1.0
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.){0,300}")')


class AffinityRouter(FIFOMixin, RequestRouter):
    """`routing.choose` over what the replicas last reported (`Endpoint.record_routing_stats`) and what was sent to them since."""

    def initialize_state(self, **_: Any) -> None:
        self._recent = RecentPrefixes()
        self._sent: dict[str, list[float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
        wanted = asked if isinstance(asked, Wanted) else Wanted(None)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._sent = {name: self._sent.get(name, []) for name in by_id}
        chosen = choose(wanted, [self._seen(name, replica.routing_stats) for name, replica in by_id.items()], self._recent)
        self._sent[chosen.id].append(time.time())
        others = [replica for name, replica in by_id.items() if name != chosen.id]
        return [[by_id[chosen.id]], *([others] if others else [])]

    def _seen(self, name: str, stats: dict[str, Any]) -> Replica:
        told_at, stay_s = float(stats.get("at", 0.0)), float(stats.get("stay_s", 0.0))
        self._sent[name] = still_there(self._sent[name], told_at, stay_s, time.time())
        return Replica(
            name,
            int(stats.get("requests", 0)) + len(self._sent[name]),
            frozenset(stats.get("adapters", ())),
            bool(stats.get("taking", True)),
        )


class Router:
    """Serve asks for the ASGI application after `__init__`."""

    async def __init__(self, endpoint: DeploymentHandle, base_id: str) -> None:  # type: ignore[misc]
        endpoint._init()
        self._application = Internal(endpoint, base_id)

    async def __serve_build_asgi_app__(self) -> Any:
        return self._application


class Internal:
    """A plain ASGI application with one route."""

    def __init__(self, endpoint: DeploymentHandle, base_id: str) -> None:
        self._endpoint = endpoint
        self._base_id = base_id

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["path"] != "/internal/route":
            await _send(send, 404, {"error": "not served"})
        else:
            wanted = read(await _body(receive), self._base_id)
            await _send(send, 200, {"replica_id": await self._chosen(wanted)})

    async def _chosen(self, wanted: Wanted) -> str:
        try:
            async with asyncio.timeout(_PATIENCE_S), self._endpoint.choose_replica(wanted, _reserve=False) as selection:
                return str(selection._replica.replica_id.to_full_id_str())
        except (TimeoutError, DeploymentUnavailableError):
            return _NOBODY


def read(body: bytes, base_id: str) -> Wanted:
    """What matters for routing. The body may be cut off, or be anything: the replica says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        found = _MODEL.search(body)
        request = {"model": json.loads(found[1]) if found else None, "prompt": body[:4096].decode("utf-8", "replace")}
    if not isinstance(request, dict):
        return Wanted(None)
    model = request.get("model")
    name = None
    if isinstance(model, str) and model != base_id:
        try:
            name = Reference.parse(model.removeprefix(f"{base_id}:")).name
        except ContractError:
            name = None
    return wanted_for(name, request)


def wanted_for(adapter: str | None, request: Mapping[str, Any], avoided: frozenset[str] = frozenset()) -> Wanted:
    """`adapter`: its name without version; None: the base."""
    text = next((str(request[key]) for key in ("messages", "prompt", "input") if request.get(key)), "")
    return Wanted(adapter, prefixes(adapter or "", text), avoided)


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


async def _body(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return b"".join(parts)


async def _send(send: Any, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def router(endpoint: Application, base_id: str, env: dict[str, str], version: str) -> Application:
    """One router beside each HAProxy; it hardly computes."""
    deployment = serve.deployment(
        name=ROUTER, ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": env}}, max_ongoing_requests=10_000
    )
    return deployment(serve.ingress()(Router)).options(version=version, _internal=True).bind(endpoint, base_id)
