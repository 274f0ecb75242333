"""What a request passes before vLLM's application has it: route, key, size, model id, limits. A plain ASGI application around vLLM's.

Tokens go from vLLM to the client as they are: nothing here decodes or encodes an answer.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from adaptfleet.on_ray.serve import embedding
from adaptfleet.on_ray.serve.accounts import Grant
from adaptfleet.on_ray.serve.adapters import Adapters
from adaptfleet.on_ray.serve.api_keys import Caller
from adaptfleet.on_ray.serve.asgi import (
    Application,
    ClientGoneError,
    Message,
    Receive,
    Scope,
    Send,
    answer,
    json_object,
    posted_inside,
    read_body,
    refuse,
)
from adaptfleet.on_ray.serve.catalog import Catalog, Served
from adaptfleet.on_ray.serve.line import Line
from adaptfleet.on_ray.serve.metrics import count_tokens, observe
from adaptfleet.on_ray.serve.refusal import RefusalError, misdirected
from adaptfleet.on_ray.serve.served_models import Current, current
from adaptfleet.on_ray.serve.shadow import Shadows
from adaptfleet.on_ray.serve.tenancy import Tenancy
from adaptfleet.on_ray.serve.tracing import Traces
from adaptfleet.on_ray.serve.viewer import viewer

ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/embeddings": "POST",
    "/pooling": "POST",
    "/score": "POST",
    "/v1/score": "POST",
    "/rerank": "POST",
    "/v1/rerank": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/metrics": "GET",
    "/healthz": "GET",
}
"""Everything else of vLLM's application (loading adapters from paths, profiling, scaling, documentation) is not served."""
_OPERATORS_ONLY = {"/metrics"}
_CLIENT_GONE = 499
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
_OURS = {b"x-request-id", b"x-vllm-priority", b"x-data-parallel-rank", b"traceparent", b"tracestate"}
"""Headers that vLLM acts on: the door's own take the place of a client's."""

log = logging.getLogger(__name__)


class Door:
    def __init__(
        self,
        application: Application,
        catalog: Catalog,
        adapters: Adapters,
        tenancy: Tenancy,
        max_request_bytes: int,
        is_healthy: Callable[[], bool],
        traces: Traces | None = None,
    ) -> None:
        self._application = application
        self._catalog = catalog
        self._adapters = adapters
        self._tenancy = tenancy
        self._max_request_bytes = max_request_bytes
        self._is_healthy = is_healthy
        self._traces = traces
        self._shadows = Shadows(self.inside)
        self.embedder: Any = None
        """The deployment that answers `embedding.ROUTES`; None: they are refused."""
        self.elsewhere: Callable[[str, Caller, str, bytes, str], Awaitable[tuple[int, bytes]]] | None = None
        """`inside` at the base of this id; None: there is no other base."""
        self.public: dict[str, tuple[bytes, bytes]] = {}
        """Pages without a key, by path: content type and bytes."""
        self.beside: dict[str, Application] = {}
        """Applications of our own by the beginning of their paths; they find the caller in the scope."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        elif scope["type"] == "http":
            self._tenancy.exchange.start()
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def inside(self, caller: Caller, path: str, body: bytes, klass: str) -> tuple[int, bytes]:
        """A request of the house's own for a tenant (a batch's row, a shadow's copy), past key and rate limits; the answer whole.

        It may be for any base of the endpoint."""
        if self.elsewhere is not None:
            base = await self._base_of(caller, body)
            if base != self._catalog.base_id:
                return await self.elsewhere(base, caller, path, body, klass)
        return await self.inside_here(caller, path, body, klass)

    async def inside_here(self, caller: Caller, path: str, body: bytes, klass: str) -> tuple[int, bytes]:
        """The same, for this base alone."""
        parts: list[bytes] = []

        async def keep(message: Message) -> None:
            parts.append(message.get("body", b""))

        async def nothing_more() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = posted_inside(path, headers)
        call = _Call(keep, uuid.uuid4().hex, scope)
        call.caller, call.klass = caller, klass
        await self._told(call, self._generation(scope, body, nothing_more, call))
        return call.status or 500, b"".join(parts)

    async def _base_of(self, caller: Caller, body: bytes) -> str:
        """The id of the base that is to answer. What is wrong with a request is told by this one."""
        try:
            request = json_object(body)
            return (await self._catalog.find(request.get("model"), self._tenancy.viewer(caller, request, ""))).base
        except RefusalError:
            return self._catalog.base_id

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/healthz" and method == "GET":
            healthy = self._is_healthy()
            await answer(send, 200 if healthy else 503, b'{"status":"ok"}' if healthy else b'{"status":"engine dead"}')
            return
        if path in self.public and method == "GET":
            content_type, page = self.public[path]
            await answer(send, 200, page, content_type)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        call = _Call(send, given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex, scope)
        await self._told(call, self._routed(scope, headers, receive, call))

    async def _told(self, call: "_Call", work: Any) -> None:
        """Does the work; whatever becomes of it is answered, counted and written down."""
        try:
            await work
        except RefusalError as refusal:
            if refusal.status >= 500:
                log.warning("%s %s %s", call.request_id, refusal.code, refusal.message)
            call.refused = refusal.code
            await refuse(call.send, refusal)
        except ClientGoneError:
            call.status = _CLIENT_GONE
        except asyncio.CancelledError:  # Serve cancels a request whose client hung up
            call.status = _CLIENT_GONE
            raise
        except Exception:
            call.status = 500
            raise
        finally:
            if call.path != "/metrics":
                self._note(call)

    def _note(self, call: "_Call") -> None:
        status, duration_s = call.status or _CLIENT_GONE, time.perf_counter() - call.started
        tenant = "shadow" if call.klass == "shadow" else call.tenant
        observe(call.model, tenant, status, duration_s, call.first_token_s)
        count_tokens(call.model, tenant, call.prompt_tokens, call.output_tokens)
        self._tenancy.audit.write(
            request_id=call.request_id,
            tenant=tenant,
            key=call.caller.key_id if call.caller else None,
            method=call.method,
            path=call.path[:120],
            model=call.model,
            status=status,
            refused=call.refused,
            prompt_tokens=call.prompt_tokens or None,
            output_tokens=call.output_tokens or None,
            seconds=round(duration_s, 4),
            first_token_s=None if call.first_token_s is None else round(call.first_token_s, 4),
            klass=call.klass,
            body=call.body.decode("utf-8", "replace") if call.body and self._tenancy.policies.audit_prompts else None,
        )

    async def _routed(self, scope: Scope, headers: Mapping[bytes, str], receive: Receive, call: "_Call") -> None:
        path, method = scope["path"], scope["method"]
        caller = call.caller = self._tenancy.caller(headers)
        beside = next((application for start, application in self.beside.items() if path == start or path.startswith(f"{start}/")), None)
        if beside is not None:
            call.model = "none"
            await beside({**scope, "adaptfleet.caller": caller}, receive, call.send)
            return
        if path not in ROUTES:
            raise RefusalError(404, f"{method} {path[:120]} is not served. Served: {', '.join(ROUTES)}.", "unknown_route")
        if method != ROUTES[path]:
            raise RefusalError(405, f"{path} takes {ROUTES[path]}, not {method}.", "method_not_allowed")
        if path in _OPERATORS_ONLY and not self._tenancy.is_operator(caller):
            raise RefusalError(403, f"{path} shows every tenant's use; only operators may read it.", "operators_only")
        if method == "GET":
            call.model = self._catalog.base_id
            token = viewer.set(self._tenancy.viewer(caller, {}, call.request_id))
            try:
                await self._application(scope, receive, call.send)
            finally:
                viewer.reset(token)
            return
        body = await read_body(headers, receive, self._tenancy.max_request_bytes(caller, self._max_request_bytes))
        await self._generation(scope, body, receive, call, headers)

    async def _generation(
        self, scope: Scope, body: bytes, receive: Receive, call: "_Call", headers: Mapping[bytes, str] | None = None
    ) -> None:
        caller = call.caller
        assert caller is not None
        call.body = body
        request = json_object(body)
        served = await self._catalog.find(request.get("model"), self._tenancy.viewer(caller, request, call.request_id))
        if served.base != self._catalog.base_id:
            raise misdirected(served.base, self._catalog.base_id)
        call.model = served.canonical
        with self._tenancy.admitted(caller, call.path, request, len(body), call.klass) as grant:
            if call.path in embedding.ROUTES:
                await self._pooled(call, body, served, grant)
                return
            adapter = None if served.adapter is None else await self._adapters.request_for(served.adapter)
            token = current.set(Current(served.requested, adapter))
            ours = [(b"x-request-id", call.request_id.encode()), (b"x-vllm-priority", str(grant.priority).encode())]
            span = None
            if self._traces is not None:
                span = self._traces.begin(headers or {}, call.path, call.request_id)
                ours += span.headers
            kept = [header for header in scope["headers"] if header[0].lower() not in _OURS]
            within_s = self._tenancy.policy(caller.tenant).max_request_s
            line = Line(body, receive)
            try:
                if not await line.serve(self._application, {**scope, "headers": kept + ours}, call.send, within_s):
                    await call.out_of_time(within_s or 0.0)
            finally:
                current.reset(token)
                call.prompt_tokens, call.output_tokens = grant.prompt_tokens, grant.output_tokens
                if span is not None:
                    span.end(call.model, call.tenant, call.status, call.prompt_tokens, call.output_tokens)
                if line.is_gone:  # whatever vLLM made of it
                    raise ClientGoneError
        if served.shadow is not None and call.klass is None:
            self._shadows.copy(caller, call.path, request, served.shadow.reference)

    async def _pooled(self, call: "_Call", body: bytes, served: Served, grant: Grant) -> None:
        if self.embedder is None:
            raise RefusalError(
                400,
                f"{call.path} is not served for {served.base}: the endpoint was started without its embeddings (the setting `embeddings`).",
                "no_embeddings",
            )
        adapter = served.adapter
        name, version = (None, None) if adapter is None else (adapter.name, adapter.version)
        pooled = await self.embedder.answer.remote(call.path, body, served.requested, name, version, call.request_id)
        grant.prompt_tokens = call.prompt_tokens = pooled.prompt_tokens
        await answer(call.send, pooled.status, pooled.body, pooled.content_type)


class _Call:
    """What is noted of one request, and the client's side of it."""

    def __init__(self, send: Send, request_id: str, scope: Scope) -> None:
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started = time.perf_counter()
        self.caller: Caller | None = None
        self.klass: str | None = None
        self.model = "unknown"
        self.status: int | None = None
        self.refused: str | None = None
        self.first_token_s: float | None = None
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.body: bytes | None = None
        self._is_stream = False
        self._send = send
        # Serve itself sends back the id that a request came with, or that Serve gave it.
        self._is_told = any(name.lower() == b"x-request-id" and value == request_id.encode() for name, value in scope["headers"])

    @property
    def tenant(self) -> str:
        return "unknown" if self.caller is None else self.caller.tenant

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            self._is_stream = any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
            if not self._is_told:
                message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        elif self._is_stream and self.first_token_s is None and message.get("body"):
            self.first_token_s = time.perf_counter() - self.started
        await self._send(message)

    async def out_of_time(self, allowed_s: float) -> None:
        """A stream that has begun ends with an error event, never as if it were whole."""
        refusal = RefusalError(408, f"The answer was not ready within {allowed_s:g} s (max_request_s).", "request_timeout")
        self.refused = refusal.code
        if self.status is None:
            await refuse(self.send, refusal)
        elif self._is_stream:
            event = b"data: " + json.dumps(json.loads(refusal.body())).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event})
            self.status = 408
        else:
            raise refusal
