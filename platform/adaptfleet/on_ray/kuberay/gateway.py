"""What a Service or a Gateway is here: one port that stays, and behind it the clusters' Serve proxies by weight, chosen for each request.

A connection that is refused has carried nothing, so the request goes to the next proxy, as gateways do. Nothing else is tried again.
"""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers", "transfer-encoding", "upgrade", "host",
    "content-length",
}  # fmt: skip


@dataclass
class Backend:
    """One cluster's proxies."""

    weight: int
    ports: tuple[int, ...]


@dataclass
class _Route:
    port: int
    backends: tuple[Backend, ...] = ()
    credits: list[float] = field(default_factory=list)
    turn: int = 0
    runner: web.AppRunner | None = None

    def order(self) -> list[int]:
        """Ports in the order to try: those of the cluster whose turn it is, then the others'."""
        usable = [backend for backend in self.backends if backend.ports and backend.weight > 0]
        if not usable:
            return []
        chosen = usable[0]
        if len(usable) > 1:
            # Smooth weighted round robin: 90 and 10 give each tenth request to the second, not ten in a row.
            if len(self.credits) != len(self.backends):
                self.credits = [0.0] * len(self.backends)
            for number, backend in enumerate(self.backends):
                self.credits[number] += backend.weight if backend in usable else 0
            best = max(range(len(self.backends)), key=lambda number: self.credits[number] if self.backends[number] in usable else -1e9)
            self.credits[best] -= sum(backend.weight for backend in usable)
            chosen = self.backends[best]
        self.turn += 1
        start = self.turn % len(chosen.ports)
        rest = [port for backend in usable if backend is not chosen for port in backend.ports]
        return [*chosen.ports[start:], *chosen.ports[:start], *rest]


class Gateway:
    def __init__(self) -> None:
        self._routes: dict[str, _Route] = {}
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._session is not None:
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def route(self, name: str, port: int, backends: tuple[Backend, ...]) -> None:
        """From now on. The first call for a name begins to listen."""
        asyncio.run_coroutine_threadsafe(self._route(name, port, backends), self._loop).result(timeout=30)

    def drop(self, names: set[str]) -> None:
        for name in names & set(self._routes):
            asyncio.run_coroutine_threadsafe(self._drop(name), self._loop).result(timeout=30)

    def names(self) -> set[str]:
        return set(self._routes)

    async def _route(self, name: str, port: int, backends: tuple[Backend, ...]) -> None:
        route = self._routes.get(name)
        if route is None:
            # A new connection for each request: one that was kept may have been closed at the other end, which looks like a failure.
            connector = aiohttp.TCPConnector(force_close=True, limit=0)
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=5), auto_decompress=False
                )
            route = _Route(port)
            app = web.Application(client_max_size=1024**3)

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._forward(request, route)

            app.router.add_route("*", "/{path:.*}", handle)
            route.runner = web.AppRunner(app, access_log=None)
            await route.runner.setup()
            await web.TCPSite(route.runner, "127.0.0.1", port).start()
            self._routes[name] = route
        route.backends = backends

    async def _drop(self, name: str) -> None:
        route = self._routes.pop(name)
        if route.runner is not None:
            await route.runner.cleanup()

    async def _forward(self, request: web.Request, route: _Route) -> web.StreamResponse:
        assert self._session is not None
        body = await request.read()
        for port in route.order():
            url = f"http://127.0.0.1:{port}{request.raw_path}"
            try:
                async with self._session.request(
                    request.method, url, headers=_passed_on(request.headers), data=body, allow_redirects=False
                ) as answer:
                    return await self._answer(request, answer)
            except aiohttp.ClientConnectorError:
                continue
            except aiohttp.ClientError as error:
                return web.Response(status=502, text=f"upstream: {type(error).__name__}")
        return web.Response(status=503, text="no proxy is ready")

    async def _answer(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        sent = web.StreamResponse(status=answer.status, headers=_passed_on(answer.headers))
        await sent.prepare(request)
        try:
            async for chunk in answer.content.iter_any():
                await sent.write(chunk)
        except aiohttp.ClientError:
            # The answer has begun: only a broken connection tells the client that it is not whole.
            if request.transport is not None:
                request.transport.abort()
            return sent
        await sent.write_eof()
        return sent


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
