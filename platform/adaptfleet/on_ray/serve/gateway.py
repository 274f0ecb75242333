"""The way in to an endpoint of several bases: reads which model is asked for and sends the request on to a replica of that model's base.

Ray Serve gives HTTP to one deployment of an application, and HAProxy knows that one's replicas alone (Ray 2.60). So this one stands before
the bases' own, has no engine, and passes bytes on without looking at them. Keys, limits and everything else is the doors' behind it.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import aiohttp
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from adaptfleet.on_ray.serve.asgi import ClientGoneError, Receive, Scope, Send, answer, json_object, read_body, refuse
from adaptfleet.on_ray.serve.bases import Offer, served_bases
from adaptfleet.on_ray.serve.catalog import VIEW_AGE_S, Catalog, Served
from adaptfleet.on_ray.serve.listener import KEEP_ALIVE_S
from adaptfleet.on_ray.serve.places import HELD_S, Places
from adaptfleet.on_ray.serve.refusal import RefusalError, engine_died, unavailable
from adaptfleet.on_ray.serve.router import wanted_for
from adaptfleet.on_ray.serve.siblings import Running
from adaptfleet.on_ray.serve.tenancy import Tenancy
from adaptfleet.on_ray.serve.unbroken import broken_off
from adaptfleet.on_ray.serve.way_in import wait_for_proxy

_TRIES = 6
"""Failures that one request may meet."""
_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
_MISDIRECTED = "another base is meant"
_UNREACHABLE = "cannot be reached"
_FORM_BYTES = 64 * 1024
"""What the form around an uploaded file may take."""
_FILES = ("/v1/files", "/v1/batches")
_HOPS = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host", b"content-length", b"expect"}
"""Headers of one connection, not of the request."""

log = logging.getLogger("ray.serve")


class Gateway:
    """Serve asks for the ASGI application after `__init__` (`__serve_build_asgi_app__`, Ray 2.60)."""

    async def __init__(  # type: ignore[misc]
        self,
        offered: tuple[Offer, ...],
        has_keys: bool,
        may_sleep: bool,
        max_request_bytes: int,
        max_file_bytes: int,
        *endpoints: DeploymentHandle,
    ) -> None:
        """`may_sleep`: no base has to have a replica. `endpoints`: the bases' deployments, in the order of `offered`."""
        self._offered = offered
        self._has_keys = has_keys
        self._may_sleep = may_sleep
        self._max_request_bytes = max_request_bytes
        self._max_file_bytes = max_file_bytes
        for endpoint in endpoints:
            endpoint._init()
        self._places = {offer.id: Places(offer.id, endpoint) for offer, endpoint in zip(offered, endpoints, strict=True)}

    async def __serve_build_asgi_app__(self) -> Any:
        from adaptfleet.on_ray.serve.api_keys import ApiKeys
        from adaptfleet.on_ray.serve.policy_file import PolicyFile
        from adaptfleet.store.registry import Registry

        # Revisions are the files' hashes; torch, which their module imports, is not to stay in this process.
        bases = await ray.remote(num_cpus=0)(served_bases).remote(self._offered)
        catalog = Catalog(Registry.open(), bases[0], bases)
        tenancy = Tenancy(ApiKeys() if self._has_keys else None, PolicyFile(), 1)
        running = Running([base.id for base in bases], serve.get_replica_context().app_name)
        await wait_for_proxy()
        return Forwarding(catalog, tenancy, self._places, running, self._may_sleep, self._max_request_bytes, self._max_file_bytes)


class Forwarding:
    """The ASGI application."""

    def __init__(
        self,
        catalog: Catalog,
        tenancy: Tenancy,
        places: Mapping[str, Places],
        running: Running,
        may_sleep: bool,
        max_request_bytes: int,
        max_file_bytes: int,
    ) -> None:
        self._catalog = catalog
        self._tenancy = tenancy
        self._places = places
        self._running = running
        self._may_sleep = may_sleep
        self._max_request_bytes = max_request_bytes
        self._max_file_bytes = max_file_bytes
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == "/healthz" and scope["method"] == "GET":
            healthy = self._may_sleep or bool(await self._running.now())
            await answer(send, 200 if healthy else 503, b'{"status":"ok"}' if healthy else b'{"status":"no base has a replica"}')
        else:
            try:
                await self._forwarded(scope, receive, send)
            except RefusalError as refusal:
                await refuse(send, refusal)
            except ClientGoneError:
                return

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            event = (await receive())["type"]
            if event == "lifespan.shutdown" and self._session is not None:
                await self._session.close()
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return

    async def _forwarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] == "POST":
            self._tenancy.caller(headers)  # nobody's body is held in memory before that
        is_file = scope["path"].startswith(_FILES)
        body = await read_body(headers, receive, self._max_file_bytes + _FORM_BYTES if is_file else self._max_request_bytes)
        kept = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"] if name.lower() not in _HOPS]
        if b"x-request-id" not in headers:
            kept.append(("x-request-id", uuid.uuid4().hex))
        line = asyncio.ensure_future(_gone(receive))
        work = asyncio.ensure_future(self._tried(scope, headers, kept, body, send))
        try:
            await asyncio.wait({line, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGoneError
            work.result()
        finally:
            line.cancel()
            work.cancel()  # closes the connection behind: the door there sees that the client is gone

    async def _tried(self, scope: Scope, headers: Mapping[bytes, str], kept: list[tuple[str, str]], body: bytes, send: Send) -> None:
        """Until a replica has begun to answer. What failed before that has not had a token, and another may give the answer."""
        avoided: frozenset[str] = frozenset()
        failures, pause_s, until = 0, _PAUSE_S, time.monotonic() + HELD_S
        while True:
            base, served, request = await self._destination(scope, headers, body)
            name = None if served is None or served.adapter is None else served.adapter.name
            replica, address = await self._places[base].find(wanted_for(name, request, avoided))
            outcome = await self._sent(address, scope, kept, body, send)
            if outcome is None:
                return
            log.info("%s of %s: %s", replica, base, outcome)
            # A replica that cannot be reached is gone, and Serve will know soon. One that failed may have failed because of this request.
            failures += outcome != _UNREACHABLE
            if failures >= _TRIES or time.monotonic() > until:
                raise unavailable(base) if outcome in (_MISDIRECTED, _UNREACHABLE) else engine_died()
            if outcome != _MISDIRECTED:
                avoided |= {replica}
            await asyncio.sleep(max(pause_s, VIEW_AGE_S if outcome == _MISDIRECTED else 0.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _destination(self, scope: Scope, headers: Mapping[bytes, str], body: bytes) -> tuple[str, Served | None, Mapping[str, Any]]:
        """The base, and where it goes by a model, what is served and the request. What is wrong is told by the door of the first base."""
        if scope["method"] != "POST" or scope["path"].startswith(_FILES):
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("base", [""])[0]
            awake = await self._running.now()
            return asked if asked in self._places else (awake or self._catalog.base_ids)[0], None, {}
        request: Mapping[str, Any] = {}
        try:
            request = json_object(body)
            caller = self._tenancy.caller(headers)
            served = await self._catalog.find(request.get("model"), self._tenancy.viewer(caller, request, ""))
            return served.base, served, request
        except RefusalError:
            return (await self._running.now() or self._catalog.base_ids)[0], None, request

    async def _sent(self, address: str, scope: Scope, headers: list[tuple[str, str]], body: bytes, send: Send) -> str | None:
        """None: answered. Else why not, and nothing was sent to the client."""
        query = scope["query_string"].decode("latin-1")
        url = f"http://{address}{scope.get('raw_path', scope['path'].encode()).decode('latin-1').partition('?')[0]}"
        has_begun = is_stream = False
        try:
            async with self._client().request(
                scope["method"], _exact(url + (f"?{query}" if query else "")), headers=headers, data=body or None, allow_redirects=False
            ) as reply:
                if reply.status == 502:  # only of a dead engine
                    return "its engine died"
                if reply.status == 421:
                    return _MISDIRECTED
                is_stream = reply.content_type == "text/event-stream"
                told = [(name.lower(), value) for name, value in reply.raw_headers if name.lower() not in _HOPS - {b"content-length"}]
                # A stream's head goes out with its first bytes: until then another replica may answer.
                begin = {"type": "http.response.start", "status": reply.status, "headers": told}
                async for chunk in reply.content.iter_any():
                    if not has_begun:
                        has_begun = True
                        await send(begin)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if not has_begun:
                    await send(begin)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return None
        except aiohttp.ClientConnectorError:
            return _UNREACHABLE
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            if not has_begun:
                return f"{type(error).__name__}: {error}"
            log.warning("an answer broke off: %s: %s", type(error).__name__, error)
            if not is_stream:
                raise
            await send({"type": "http.response.body", "body": broken_off(is_engine_alive=False), "more_body": False})
            return None

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S / 2),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _exact(url: str) -> Any:
    """As the client wrote it: a path that is quoted stays so."""
    from yarl import URL

    return URL(url, encoded=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
