"""Runs batches through the replica's own door and engine, behind every live request, and goes on after a restart where it was.

Each batch is one replica's at a time (`ledger.claim`). Answered rows are written in parts; rows that are in no part run again. A row
answered twice, because its replica died before it wrote the part, is in the output once.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from adaptfleet.contracts.errors import StoreError
from adaptfleet.on_ray.serve.api_keys import Caller
from adaptfleet.on_ray.serve.batch_input import Row, parse_rows
from adaptfleet.on_ray.serve.ledger import Exchange
from adaptfleet.store.batches import ENDED, BatchRecord, BatchState, BatchStore, FileRecord, RowError

_LOOK_EVERY_S = 2.0
_MAX_BATCHES = 4
_PART_ROWS = 200
_PART_EVERY_S = 5.0
_CANCEL_EVERY_S = 1.0
_TRIES = 3
_RETRY_PAUSE_S = 1.0

log = logging.getLogger(__name__)

Inside = Callable[[Caller, str, bytes, str], Awaitable[tuple[int, bytes]]]


class BatchRunner:
    def __init__(
        self, store: BatchStore, exchange: Exchange, inside: Inside, is_enabled: Callable[[str], bool], max_rows_at_once: int
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._inside = inside
        self._is_enabled = is_enabled
        self._slots = asyncio.Semaphore(max_rows_at_once)
        self._max_rows_at_once = max_rows_at_once
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tenant_of: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._forever())

    async def _forever(self) -> None:
        while True:
            try:
                await self.look()
            except StoreError as error:
                log.error("batches wait, the store cannot be read: %s", error)
            except Exception:
                log.exception("looking for batches failed")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> None:
        """Starts what is open and nobody else's: a few at once, of the tenants with the fewest running, the oldest first."""
        waiting = [item for item in await asyncio.to_thread(self._store.open_batches) if item[1] not in self._running]
        while waiting and len(self._running) < _MAX_BATCHES:
            running = Counter(self._tenant_of[batch_id] for batch_id in self._running)
            tenant, batch_id = waiting.pop(min(range(len(waiting)), key=lambda i: (running[waiting[i][0]], i)))
            if not self._is_enabled(tenant):
                continue
            record = await asyncio.to_thread(self._store.batch, tenant, batch_id)
            if record is not None and await self._exchange.claim(batch_id):
                task = asyncio.get_running_loop().create_task(self._run(record))
                self._running[batch_id], self._tenant_of[batch_id] = task, tenant
                task.add_done_callback(lambda _, done=batch_id: self._ended(done))  # type: ignore[misc]

    def _ended(self, batch_id: str) -> None:
        del self._running[batch_id], self._tenant_of[batch_id]

    async def _run(self, record: BatchRecord) -> None:
        try:
            await self._whole(record)
        except StoreError as error:
            log.error("batch %s waits, the store fails: %s", record.id, error)
        except Exception:
            log.exception("batch %s failed and will be tried again", record.id)
        finally:
            await self._exchange.release(record.id)

    async def _whole(self, record: BatchRecord) -> None:
        store, state = self._store, await asyncio.to_thread(self._store.state, record)
        if state.status in ENDED:
            await asyncio.to_thread(store.set_state, record, state)  # clears what a kill has left
            return
        content = await asyncio.to_thread(store.content, record.tenant, record.input_file_id)
        if content is None:
            rows: list[Row] = []
            wrong = [RowError(code="missing_file", message=f"The input file {record.input_file_id} was deleted.")]
        else:
            rows, wrong = await asyncio.to_thread(parse_rows, content, record.endpoint)
        if wrong:
            failed = state.model_copy(update={"status": "failed", "errors": tuple(wrong), "failed_at": _now()})
            await asyncio.to_thread(store.set_state, record, failed)
            return
        answered = {line["custom_id"]: line for line in await asyncio.to_thread(lambda: list(_lines(store, record)))}
        state = state.model_copy(
            update={"status": "in_progress", "in_progress_at": state.in_progress_at or _now(), "total": len(rows)} | _counts(answered)
        )
        await asyncio.to_thread(store.set_state, record, state)
        state, ended = await self._rows(record, state, rows, answered)
        state = state.model_copy(update={"status": "finalizing", "finalizing_at": _now()} | _counts(answered))
        await asyncio.to_thread(store.set_state, record, state)
        state = await asyncio.to_thread(self._finish, record, state, rows, answered, ended)
        await asyncio.to_thread(store.set_state, record, state)
        log.info("batch %s of %s: %s, %d answered, %d failed", record.id, record.tenant, state.status, state.completed, state.failed)

    async def _rows(
        self, record: BatchRecord, state: BatchState, rows: list[Row], answered: dict[str, dict[str, Any]]
    ) -> tuple[BatchState, str]:
        """Runs what is not answered yet. Returns how it ended: completed, cancelled or expired."""
        caller = Caller(record.tenant, record.key_id, record.models)
        left = iter([row for row in rows if row.custom_id not in answered])
        fresh: list[dict[str, Any]] = []
        pending: set[asyncio.Task[dict[str, Any]]] = set()
        # One part's name is never used twice: after a restart this is another writer.
        writer, num_parts, written_at, ended = secrets.token_hex(8), 0, time.monotonic(), "completed"
        looked_at = float("-inf")
        try:
            while True:
                while ended == "completed" and len(pending) < self._max_rows_at_once and (row := next(left, None)) is not None:
                    pending.add(asyncio.get_running_loop().create_task(self._row(caller, record, row)))
                if pending:
                    done, pending = await asyncio.wait(pending, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                    fresh += [task.result() for task in done]
                if fresh and (not pending or len(fresh) >= _PART_ROWS or time.monotonic() - written_at > _PART_EVERY_S):
                    num_parts, written_at = num_parts + 1, time.monotonic()
                    part = "".join(json.dumps(line) + "\n" for line in fresh).encode()
                    await asyncio.to_thread(self._store.add_part, record, writer, num_parts, part)
                    answered |= {line["custom_id"]: line for line in fresh}
                    fresh = []
                    state = state.model_copy(update=_counts(answered))
                    await asyncio.to_thread(self._store.set_state, record, state)
                if ended == "completed" and _now() >= record.expires_at:
                    ended = "expired"
                if ended == "completed" and time.monotonic() - looked_at > _CANCEL_EVERY_S:
                    looked_at = time.monotonic()
                    ended = "cancelled" if await asyncio.to_thread(self._store.is_cancelled, record) else ended
                if not pending and (ended != "completed" or len(answered) == len(rows)):
                    return state, ended
        finally:
            for task in pending:
                task.cancel()

    async def _row(self, caller: Caller, record: BatchRecord, row: Row) -> dict[str, Any]:
        async with self._slots:
            for attempt in range(_TRIES):
                status, answer = await self._inside(caller, record.endpoint, json.dumps(row.body).encode(), "batch")
                if status < 500 or attempt == _TRIES - 1:
                    break
                await asyncio.sleep(_RETRY_PAUSE_S * 2**attempt)
        try:
            body = json.loads(answer)
        except ValueError:
            status, body = 500, {"error": {"message": "The answer was no JSON.", "type": "server_error", "param": None, "code": None}}
        return {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": row.custom_id,
            "response": {"status_code": status, "request_id": body.get("id") if isinstance(body, dict) else None, "body": body},
            "error": None,
        }

    def _finish(
        self, record: BatchRecord, state: BatchState, rows: list[Row], answered: dict[str, dict[str, Any]], ended: str
    ) -> BatchState:
        """The output and the errors as files, in the input's order. Their ids follow from the batch's, so that twice is once."""
        good = [answered[row.custom_id] for row in rows if row.custom_id in answered and _is_good(answered[row.custom_id])]
        bad = [answered[row.custom_id] for row in rows if row.custom_id in answered and not _is_good(answered[row.custom_id])]
        if ended == "expired":
            error = {"code": "batch_expired", "message": "The batch's time was over before this row ran."}
            unanswered = [row.custom_id for row in rows if row.custom_id not in answered]
            bad += [{"id": f"batch_req_{_digest(record.id, i)}", "custom_id": i, "response": None, "error": error} for i in unanswered]
        files: dict[str, str | None] = {}
        for kind, lines in (("output", good), ("error", bad)):
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            file = FileRecord(
                id=f"file-{_digest(record.id, kind)}",
                tenant=record.tenant,
                num_bytes=len(content),
                created_at=_now(),
                filename=f"{record.id}_{kind}.jsonl",
                purpose="batch_output",
            )
            if lines:
                self._store.add_file(file, content)
            files[f"{kind}_file_id"] = file.id if lines else None
        return state.model_copy(update={"status": ended, f"{ended}_at": _now()} | files)


def _lines(store: BatchStore, record: BatchRecord) -> Iterator[dict[str, Any]]:
    for part in store.parts(record):
        for line in part.splitlines():
            yield json.loads(line)


def _is_good(line: dict[str, Any]) -> bool:
    return line["response"] is not None and line["response"]["status_code"] < 400


def _counts(answered: dict[str, dict[str, Any]]) -> dict[str, int]:
    num_good = sum(map(_is_good, answered.values()))
    return {"completed": num_good, "failed": len(answered) - num_good}


def _digest(batch_id: str, what: str) -> str:
    return hashlib.sha256(f"{batch_id}\0{what}".encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _now() -> int:
    return int(time.time())
