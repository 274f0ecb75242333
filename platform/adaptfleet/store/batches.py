"""Files that tenants upload, and batches of requests over them, kept in the store. A tenant's keys all begin with the tenant.

files/TENANT/ID/content                     the bytes, written before the record
files/TENANT/ID/file.json                   a FileRecord: creating it makes the file exist, whole
batches/TENANT/ID/batch.json                a BatchRecord: what was asked, never changed
batches/TENANT/ID/state.json                a BatchState: replaced by the one replica that runs the batch
batches/TENANT/ID/cancel                    the client wants it to end
batches/TENANT/ID/parts/REPLICA-000001.jsonl  answered rows, each part written once
open-batches/TENANT/ID                      there as long as there is work to do

Ids are made here and checked before they become part of a key; a file's name is only text in its record.
"""

import re
import secrets
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.names import SafeName, check_name
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import R, from_bytes, to_bytes

Purpose = Literal["batch", "batch_output"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED = ("failed", "completed", "expired", "cancelled")
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")


class FileRecord(Spec):
    id: str
    tenant: SafeName
    num_bytes: Annotated[int, Field(ge=0)]
    created_at: int
    filename: Annotated[str, Field(max_length=255)]
    purpose: Purpose


class BatchRecord(Spec):
    id: str
    tenant: SafeName
    key_id: str
    """The key that asked; its scope holds for the rows too."""
    models: Annotated[tuple[str, ...], Field(strict=False)]
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] = {}


class RowError(Spec):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchState(Spec):
    status: Status = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: Annotated[tuple[RowError, ...], Field(strict=False)] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None


def new_id(prefix: Literal["file-", "batch_"]) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


class BatchStore:
    """Reads and writes; blocking, so to be called in a thread. StoreError where the store fails."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    # files

    def add_file(self, record: FileRecord, content: bytes) -> bool:
        """Whole, or not at all. False where a file of this id exists: it stays as it is."""
        folder = _folder("files", record.tenant, record.id)
        if self._objects.info(f"{folder}/file.json") is not None:
            return False
        self._objects.put(f"{folder}/content", content)
        return self._objects.put_new(f"{folder}/file.json", to_bytes(record))

    def file(self, tenant: str, file_id: str) -> FileRecord | None:
        if not _ID.fullmatch(file_id):
            return None
        return self._get(FileRecord, f"{_folder('files', tenant, file_id)}/file.json")

    def content(self, tenant: str, file_id: str) -> bytes | None:
        return self._objects.get(f"{_folder('files', tenant, file_id)}/content") if _ID.fullmatch(file_id) else None

    def files(self, tenant: str) -> list[FileRecord]:
        """The newest first."""
        keys = [info.key for info in self._objects.list(f"files/{check_name(tenant)}") if info.key.endswith("/file.json")]
        found = [record for key in keys if (record := self._get(FileRecord, key)) is not None]
        return sorted(found, key=lambda record: (-record.created_at, record.id))

    def remove_file(self, tenant: str, file_id: str) -> bool:
        """The record first, so that no one reads half a file."""
        if self.file(tenant, file_id) is None:
            return False
        folder = _folder("files", tenant, file_id)
        self._objects.delete([f"{folder}/file.json", f"{folder}/content"])
        return True

    # batches

    def add_batch(self, record: BatchRecord) -> None:
        folder = _folder("batches", record.tenant, record.id)
        self._objects.put(f"{folder}/state.json", to_bytes(BatchState()))
        self._objects.put_new(f"{folder}/batch.json", to_bytes(record))
        # Last: whoever sees the work to do finds all that belongs to it.
        self._objects.put_new(f"open-batches/{record.tenant}/{record.id}", b"")

    def batch(self, tenant: str, batch_id: str) -> BatchRecord | None:
        if not _ID.fullmatch(batch_id):
            return None
        return self._get(BatchRecord, f"{_folder('batches', tenant, batch_id)}/batch.json")

    def batches(self, tenant: str) -> list[BatchRecord]:
        """The newest first."""
        keys = [info.key for info in self._objects.list(f"batches/{check_name(tenant)}") if info.key.endswith("/batch.json")]
        found = [record for key in keys if (record := self._get(BatchRecord, key)) is not None]
        return sorted(found, key=lambda record: (-record.created_at, record.id))

    def open_batches(self) -> list[tuple[str, str]]:
        """Tenants and ids of batches with work to do, the oldest first."""
        infos = sorted(self._objects.list("open-batches"), key=lambda info: (info.modified_at, info.key))
        keys = [info.key.split("/") for info in infos]
        return [(parts[1], parts[2]) for parts in keys if len(parts) == 3 and _ID.fullmatch(parts[2])]

    def state(self, record: BatchRecord) -> BatchState:
        return self._get(BatchState, f"{_folder('batches', record.tenant, record.id)}/state.json") or BatchState()

    def set_state(self, record: BatchRecord, state: BatchState) -> None:
        self._objects.put(f"{_folder('batches', record.tenant, record.id)}/state.json", to_bytes(state))
        if state.status in ENDED:
            self._objects.delete([f"open-batches/{record.tenant}/{record.id}"])
            self._objects.delete_folder(f"{_folder('batches', record.tenant, record.id)}/parts")

    def cancel(self, record: BatchRecord) -> None:
        self._objects.put_new(f"{_folder('batches', record.tenant, record.id)}/cancel", b"")

    def is_cancelled(self, record: BatchRecord) -> bool:
        return self._objects.info(f"{_folder('batches', record.tenant, record.id)}/cancel") is not None

    def add_part(self, record: BatchRecord, writer: str, number: int, content: bytes) -> None:
        """`writer` is of one run of a replica, so that no two write the same part."""
        self._objects.put(f"{_folder('batches', record.tenant, record.id)}/parts/{check_name(writer)}-{number:06d}.jsonl", content)

    def parts(self, record: BatchRecord) -> Iterator[bytes]:
        prefix = f"{_folder('batches', record.tenant, record.id)}/parts"
        for key in sorted(info.key for info in self._objects.list(prefix)):
            content = self._objects.get(key)
            if content is not None:
                yield content

    def _get(self, kind: type[R], key: str) -> R | None:
        content = self._objects.get(key)
        return None if content is None else from_bytes(kind, key, content)


def _folder(kind: str, tenant: str, item_id: str) -> str:
    if not _ID.fullmatch(item_id):
        raise ValueError(f"{item_id!r} is no id")
    return f"{kind}/{check_name(tenant)}/{item_id}"
