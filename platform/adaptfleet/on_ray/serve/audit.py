"""The audit log: one line of JSON for each request, without prompts, in `logs/audit/` of the home, a file a day and replica.

It is what the endpoint keeps of who asked for what: time, request id, tenant, the key's id, route, model, status, tokens, seconds. Bodies
are in it only where `audit_prompts` says so. A log that cannot be written (a full disk) is counted and told once a minute; requests go on.
"""

import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import Counter

_TELL_EVERY_S = 60.0

unwritten_total = Counter("adaptfleet_audit_unwritten_total", "Lines of the audit log that could not be written.")

log = logging.getLogger(__name__)


class AuditLog:
    def __init__(self, folder: Path, replica: str) -> None:
        self._folder = folder
        self._replica = replica[:12]
        self._day = ""
        self._descriptor: int | None = None
        self._told_at = float("-inf")

    def write(self, **facts: Any) -> None:
        """Facts that are None are left out."""
        now = datetime.now(UTC)
        line = {"time": now.isoformat(timespec="milliseconds")} | {name: fact for name, fact in facts.items() if fact is not None}
        try:
            # One write call of a whole line: lines of a file never mix, and a reader sees whole ones.
            os.write(self._open(f"{now:%Y-%m-%d}"), json.dumps(line, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            unwritten_total.inc()
            if time.monotonic() - self._told_at > _TELL_EVERY_S:
                self._told_at = time.monotonic()
                log.error("the audit log in %s cannot be written: %s", self._folder, error)
            self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, day: str) -> int:
        if self._descriptor is None or day != self._day:
            self.close()
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = self._folder / f"{day}-{self._replica}.jsonl"
            self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._day = day
        return self._descriptor
