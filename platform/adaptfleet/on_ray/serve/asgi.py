"""The few pieces of ASGI that the door and what stands beside it share: reading a body within bounds, replaying it, answering."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from adaptfleet.on_ray.serve.refusal import RefusalError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Mapping[bytes, str]
_PAGES_MAY = b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"


class ClientGoneError(Exception):
    pass


def posted_inside(path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """The scope of a POST that the house itself makes."""
    place = {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "headers": headers,
    } | place


async def read_body(headers: Headers, receive: Receive, allowed: int) -> bytes:
    """RefusalError: 413, before more than `allowed` bytes are held."""
    length = headers.get(b"content-length", "")
    if length.isdecimal() and int(length) > allowed:
        raise _too_large(f"{int(length)} bytes", allowed)
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > allowed:
            raise _too_large(f"more than {allowed} bytes", allowed)
        if not message.get("more_body", False):
            return b"".join(parts)


def json_object(body: bytes) -> dict[str, Any]:
    """RefusalError: 400."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RefusalError(400, f"The request's body is no JSON: {reason}.", "invalid_json") from None
    if not isinstance(request, dict):
        raise RefusalError(400, f"The request's body is a JSON {type(request).__name__}; it is an object.", "invalid_json")
    return request


async def answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    retry_after_s: int | None = None,
    is_final: bool = False,
) -> None:
    """`is_final`: OpenAI's clients, which try some statuses again by themselves, are told not to."""
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    if is_final:
        headers.append((b"x-should-retry", b"false"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if content_type.startswith(b"text/"):
        headers += [(b"content-security-policy", _PAGES_MAY), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, refusal: RefusalError) -> None:
    is_final = refusal.status in (408, 409) or refusal.code == "insufficient_quota"
    await answer(send, refusal.status, refusal.body(), retry_after_s=refusal.retry_after_s, is_final=is_final)


def _too_large(size: str, allowed: int) -> RefusalError:
    return RefusalError(413, f"The request's body has {size}; {allowed} are allowed (max_request_bytes).", "request_too_large")
