"""Who may call: bearer keys, each of a tenant, scoped and expiring, looked up by their SHA-256 and never logged."""

import logging
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.tenants import KeyRecord, matches
from adaptfleet.on_ray.serve.key_file import VARIABLE, ensure_keys, first_key, keys_file, read_keys, sha256_of

__all__ = ["ApiKeys", "Caller", "ensure_keys", "first_key", "keys_file"]

_RECHECK_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    key_id: str
    models: tuple[str, ...] = ("*",)
    expired: bool = False

    def may_name(self, model: str) -> bool:
        return matches(self.models, model)


class ApiKeys:
    """Tells a key's caller. The file is read again when it changes; a broken edit leaves the last good keys in force and is logged."""

    def __init__(self) -> None:
        ensure_keys()
        self._file = None if os.environ.get(VARIABLE) else keys_file()
        self._records: dict[str, KeyRecord] = read_keys()
        self._stamp = self._look()
        self._checked_at = time.monotonic()

    def caller(self, key: str) -> Caller | None:
        """None: no such key."""
        self._refresh()
        # A look-up by the hash: how long it takes tells of the hash of what was sent, which tells nothing of a key.
        record = self._records.get(sha256_of(key))
        if record is None:
            return None
        expired = record.expires_at is not None and record.expires_at <= datetime.now(UTC)
        return Caller(record.tenant, record.id, record.models, expired)

    def tenants(self) -> list[str]:
        self._refresh()
        return sorted({record.tenant for record in self._records.values()})

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._checked_at < _RECHECK_S:
            return
        self._checked_at = now
        stamp = self._look()
        if stamp is None:
            self._records, self._stamp = {}, None  # the keys were taken away: nobody may call
        elif stamp != self._stamp:
            self._stamp = stamp
            try:
                self._records = read_keys()
            except ServingError as error:
                log.error("the keys stay as they were: %s", error)

    def _look(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
