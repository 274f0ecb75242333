"""What a request passes before vLLM's application has it: route, key, size, model id. A plain ASGI application around vLLM's.

Tokens go from vLLM to the client as they are: nothing here decodes or encodes an answer.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adaptfleet.on_ray.serve.adapters import Adapters
from adaptfleet.on_ray.serve.api_keys import ApiKeys
from adaptfleet.on_ray.serve.catalog import Catalog, Served
from adaptfleet.on_ray.serve.metrics import observe
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.on_ray.serve.served_models import Current, current

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/embeddings": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/metrics": "GET",
    "/healthz": "GET",
}
"""Everything else of vLLM's application (loading adapters from paths, profiling, scaling, documentation) is not served."""
_CLIENT_GONE = 499
_NO_TENANT = "none"

log = logging.getLogger(__name__)


class Door:
    def __init__(
        self,
        application: Application,
        catalog: Catalog,
        adapters: Adapters,
        keys: ApiKeys | None,
        max_request_bytes: int,
        is_healthy: Callable[[], bool],
    ) -> None:
        """`keys` None: anybody may call, as the tenant `none`."""
        self._application = application
        self._catalog = catalog
        self._adapters = adapters
        self._keys = keys
        self._max_request_bytes = max_request_bytes
        self._is_healthy = is_healthy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/healthz" and scope["method"] == "GET":
            healthy = self._is_healthy()
            await _answer(send, 200 if healthy else 503, b'{"status":"ok"}' if healthy else b'{"status":"engine dead"}')
            return
        call = _Call(send)
        try:
            await self._admitted(scope, receive, call)
        except RefusalError as refusal:
            if refusal.status >= 500:
                log.warning("%s %s", refusal.code, refusal.message)
            await _answer(call.send, refusal.status, refusal.body())
        except _ClientGoneError:
            call.status = _CLIENT_GONE
        except asyncio.CancelledError:  # Serve cancels a request whose client hung up
            call.status = _CLIENT_GONE
            raise
        except Exception:
            call.status = 500
            raise
        finally:
            if scope["path"] != "/metrics":
                observe(call.model, call.tenant, call.status or _CLIENT_GONE, time.perf_counter() - call.started, call.first_token_s)

    async def _admitted(self, scope: Scope, receive: Receive, call: "_Call") -> None:
        path, method = scope["path"], scope["method"]
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        call.tenant = self._tenant(headers)
        if path not in ROUTES:
            raise RefusalError(404, f"{method} {path[:120]} is not served. Served: {', '.join(ROUTES)}.", "unknown_route")
        if method != ROUTES[path]:
            raise RefusalError(405, f"{path} takes {ROUTES[path]}, not {method}.", "method_not_allowed")
        if method == "GET":
            call.model = self._catalog.base_id
            await self._application(scope, receive, call.send)
            return
        body = await self._body(headers, receive)
        served = await self._model(body)
        call.model = served.canonical
        adapter = None if served.adapter is None else await self._adapters.request_for(served.adapter)
        token = current.set(Current(served.requested, adapter))
        try:
            await self._application(scope, _replay(body, receive), call.send)
        finally:
            current.reset(token)

    def _tenant(self, headers: dict[bytes, str]) -> str:
        if self._keys is None:
            return _NO_TENANT
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get(b"x-api-key", "")  # how clients of /v1/messages send it
        if not key:
            raise RefusalError(401, "No API key. Send it as 'Authorization: Bearer KEY'.", "missing_api_key")
        tenant = self._keys.tenant(key.strip())
        if tenant is None:
            raise RefusalError(401, "The API key is not known here.", "invalid_api_key")
        return tenant

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes:
        allowed = self._max_request_bytes
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > allowed:
            raise _too_large(f"{int(length)} bytes", allowed)
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > allowed:
                raise _too_large(f"more than {allowed} bytes", allowed)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _model(self, body: bytes) -> Served:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise RefusalError(400, f"The request's body is no JSON: {reason}.", "invalid_json") from None
        if not isinstance(request, dict):
            raise RefusalError(400, f"The request's body is a JSON {type(request).__name__}; it is an object.", "invalid_json")
        return await self._catalog.find(request.get("model"))


class _ClientGoneError(Exception):
    """The client hung up before its request was whole."""


class _Call:
    """One request's numbers, gathered as the answer passes by."""

    def __init__(self, send: Send) -> None:
        self.started = time.perf_counter()
        self.model = "unknown"
        self.tenant = "unknown"
        self.status: int | None = None
        self.first_token_s: float | None = None
        self._is_stream = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in message.get("headers", ())
            )
        elif self._is_stream and self.first_token_s is None and message.get("body"):
            self.first_token_s = time.perf_counter() - self.started
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body again, then whatever comes after it (the client hanging up)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _too_large(size: str, allowed: int) -> RefusalError:
    return RefusalError(413, f"The request's body has {size}; {allowed} are allowed (max_request_bytes).", "request_too_large")


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
