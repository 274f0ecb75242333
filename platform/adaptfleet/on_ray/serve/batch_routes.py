"""`/v1/files` and `/v1/batches`, as OpenAI's API has them. Each tenant sees its own alone; another's are as unknown as what never was."""

import asyncio
import re
import time
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adaptfleet.contracts.errors import StoreError
from adaptfleet.on_ray.serve.api_keys import Caller
from adaptfleet.on_ray.serve.asgi import Message, Receive, Scope, Send, json_object, read_body
from adaptfleet.on_ray.serve.batch_input import ENDPOINTS
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.store.batches import ENDED, BatchRecord, BatchState, BatchStore, FileRecord, new_id

MAX_FILE_BYTES = 100 * 1024 * 1024
_PATH = re.compile(r"(/v1/files|/v1/batches)/([^/]{1,128})(/[a-z]+)?")
_MAX_JSON_BYTES = 64 * 1024
_MAX_LISTED = 100
_MULTIPART_BYTES = 64 * 1024
"""What the form around a file may take."""
_WINDOW = re.compile(r"([1-9]\d{0,2})h")
_MAX_WINDOW_H = 168


class BatchRoutes:
    def __init__(self, store: BatchStore, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._store = store
        self._max_file_bytes = max_file_bytes
        self._handlers = {
            ("POST", "/v1/files"): self.add_file,
            ("GET", "/v1/files"): self.list_files,
            ("GET", "/v1/files/ID"): self.file,
            ("DELETE", "/v1/files/ID"): self.remove_file,
            ("GET", "/v1/files/ID/content"): self.content,
            ("POST", "/v1/batches"): self.add_batch,
            ("GET", "/v1/batches"): self.list_batches,
            ("GET", "/v1/batches/ID"): self.batch,
            ("POST", "/v1/batches/ID/cancel"): self.cancel,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"].rstrip("/"), scope["method"]
        match = _PATH.fullmatch(path)
        route = path if match is None else f"{match[1]}/ID{match[3] or ''}"
        handler = self._handlers.get((method, route))
        if handler is None:
            takes = sorted(allowed for allowed, known in self._handlers if known == route)
            if takes:
                raise RefusalError(405, f"{path[:120]} takes {' and '.join(takes)}, not {method}.", "method_not_allowed")
            raise RefusalError(404, f"{method} {path[:120]} is not served.", "unknown_route")
        request = Request({**scope, "path_params": {"id": match[2] if match else ""}}, receive)
        response = await handler(request)
        await response(scope, receive, send)

    async def add_file(self, request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_file_bytes + _MULTIPART_BYTES:
            raise self._too_large()
        bounded = Request(request.scope, self._bounded(request.receive))
        try:
            form = await bounded.form(max_files=1, max_fields=8)
        except MultiPartException as error:
            raise RefusalError(400, f"The upload is no form: {error.message}", "invalid_form") from None
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise RefusalError(400, "The form has no file.", "missing_file", "file")
            if purpose != "batch":
                raise RefusalError(400, f"purpose is {str(purpose)[:40]!r}; files are taken for 'batch'.", "invalid_purpose", "purpose")
            content = await file.read()
        finally:
            await form.close()
        if len(content) > self._max_file_bytes:
            raise self._too_large()
        record = FileRecord(
            id=new_id("file-"),
            tenant=_caller(request).tenant,
            num_bytes=len(content),
            created_at=int(time.time()),
            filename=(file.filename or "file.jsonl")[:255],
            purpose="batch",
        )
        await _stored(self._store.add_file, record, content)
        return JSONResponse(_file(record))

    async def list_files(self, request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        records = await _stored(self._store.files, _caller(request).tenant)
        shown, has_more = _cut(request, [record for record in records if purpose in (None, record.purpose)])
        return _page([_file(record) for record in shown], has_more)

    async def file(self, request: Request) -> Response:
        return JSONResponse(_file(await self._file(request)))

    async def content(self, request: Request) -> Response:
        record = await self._file(request)
        content = await _stored(self._store.content, record.tenant, record.id)
        if content is None:
            raise _no_such("file", record.id)
        return Response(content, media_type="application/octet-stream")

    async def remove_file(self, request: Request) -> Response:
        record = await self._file(request)
        await _stored(self._store.remove_file, record.tenant, record.id)
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    async def add_batch(self, request: Request) -> Response:
        headers = {name.lower(): value.decode("latin-1") for name, value in request.scope["headers"]}
        asked = json_object(await read_body(headers, request.receive, _MAX_JSON_BYTES))
        caller = _caller(request)
        endpoint, window, file_id = asked.get("endpoint"), asked.get("completion_window", "24h"), asked.get("input_file_id")
        metadata = asked.get("metadata") or {}
        match = _WINDOW.fullmatch(window) if isinstance(window, str) else None
        if endpoint not in ENDPOINTS:
            raise RefusalError(400, f"endpoint is one of {', '.join(ENDPOINTS)}.", "invalid_endpoint", "endpoint")
        if match is None or int(match[1]) > _MAX_WINDOW_H:
            raise RefusalError(400, f"completion_window is 1h to {_MAX_WINDOW_H}h, such as 24h.", "invalid_window", "completion_window")
        if not _is_metadata(metadata):
            raise RefusalError(400, "metadata has up to 16 strings of up to 512 characters.", "invalid_metadata", "metadata")
        file = await _stored(self._store.file, caller.tenant, file_id) if isinstance(file_id, str) else None
        if file is None:
            raise RefusalError(
                400, f"There is no file {str(file_id)[:60]!r}. Upload it to /v1/files first.", "file_not_found", "input_file_id"
            )
        now = int(time.time())
        record = BatchRecord(
            id=new_id("batch_"),
            tenant=caller.tenant,
            key_id=caller.key_id,
            models=caller.models,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=window,
            created_at=now,
            expires_at=now + int(match[1]) * 3600,
            metadata=metadata,
        )
        await _stored(self._store.add_batch, record)
        return JSONResponse(_batch(record, BatchState(), False))

    async def list_batches(self, request: Request) -> Response:
        records = await _stored(self._store.batches, _caller(request).tenant)
        shown, has_more = _cut(request, records)
        return _page([await self._shown(record) for record in shown], has_more)

    async def batch(self, request: Request) -> Response:
        return JSONResponse(await self._shown(await self._batch(request)))

    async def cancel(self, request: Request) -> Response:
        record = await self._batch(request)
        state = await _stored(self._store.state, record)
        if state.status in ENDED:
            raise RefusalError(409, f"The batch is {state.status} already.", "batch_ended")
        await _stored(self._store.cancel, record)
        return JSONResponse(await self._shown(record))

    async def _shown(self, record: BatchRecord) -> dict[str, Any]:
        state = await _stored(self._store.state, record)
        return _batch(record, state, state.status not in ENDED and await _stored(self._store.is_cancelled, record))

    async def _file(self, request: Request) -> FileRecord:
        file_id = request.path_params["id"]
        record: FileRecord | None = await _stored(self._store.file, _caller(request).tenant, file_id)
        if record is None:
            raise _no_such("file", file_id)
        return record

    async def _batch(self, request: Request) -> BatchRecord:
        batch_id = request.path_params["id"]
        record: BatchRecord | None = await _stored(self._store.batch, _caller(request).tenant, batch_id)
        if record is None:
            raise _no_such("batch", batch_id)
        return record

    def _bounded(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_file_bytes + _MULTIPART_BYTES:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> RefusalError:
        return RefusalError(413, f"A file has at most {self._max_file_bytes} bytes. Split it.", "file_too_large", "file")


async def _stored(work: Any, *args: Any) -> Any:
    try:
        return await asyncio.to_thread(work, *args)
    except StoreError:
        raise RefusalError(503, "The store cannot be reached now. Try again.", "store_unavailable", retry_after_s=5) from None


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["adaptfleet.caller"]
    return caller


def _no_such(kind: str, wanted: str) -> RefusalError:
    return RefusalError(404, f"No such {kind}: {wanted[:60]!r}.", f"{kind}_not_found", "id")


def _is_metadata(metadata: Any) -> bool:
    return (
        isinstance(metadata, dict)
        and len(metadata) <= 16
        and all(isinstance(value, str) and len(key) <= 64 and len(value) <= 512 for key, value in metadata.items())
    )


def _cut(request: Request, records: list[Any]) -> tuple[list[Any], bool]:
    """Those of the wanted page, and whether more follow."""
    limit = request.query_params.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_LISTED:
        raise RefusalError(400, f"limit is 1 to {_MAX_LISTED}.", "invalid_limit", "limit")
    ids = [record.id for record in records]
    after = request.query_params.get("after")
    left = records[ids.index(after) + 1 :] if after in ids else records
    return left[: int(limit)], len(left) > int(limit)


def _page(shown: list[dict[str, Any]], has_more: bool) -> Response:
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return JSONResponse({"object": "list", "data": shown, "has_more": has_more} | ends)


def _file(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": record.created_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


def _batch(record: BatchRecord, state: BatchState, is_cancelling: bool) -> dict[str, Any]:
    status = "cancelling" if is_cancelling else state.status
    errors = [error.model_dump() for error in state.errors]
    counts = {"total": state.total, "completed": state.completed, "failed": state.failed}
    return (
        {"id": record.id, "object": "batch", "endpoint": record.endpoint, "input_file_id": record.input_file_id, "status": status}
        | {"errors": {"object": "list", "data": errors} if errors else None, "completion_window": record.completion_window}
        | {"created_at": record.created_at, "expires_at": record.expires_at, "metadata": record.metadata, "request_counts": counts}
        | state.model_dump(include={"output_file_id", "error_file_id"})
        | {name: value for name, value in state.model_dump().items() if name.endswith("_at")}
    )
