"""Who may call: bearer keys, each of a tenant.

From ADAPTFLEET_API_KEYS, `tenant:key,tenant:key`, or the file `api-keys` in the home with a `tenant:key` on each line, readable by its
owner alone. The file is read again when it changes. Keys are compared by their SHA-256 in constant time and never logged.
"""

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from adaptfleet.contracts.errors import ContractError, ServingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.names import check_name

_VARIABLE = "ADAPTFLEET_API_KEYS"
_MIN_KEY_CHARS = 16
_RECHECK_S = 1.0


def keys_file() -> Path:
    return home() / "api-keys"


def ensure_keys() -> str:
    """Makes a key of the tenant `default` where there is none yet. Returns where the keys are, never the keys."""
    if os.environ.get(_VARIABLE):
        _parse(os.environ[_VARIABLE].split(","), _VARIABLE)
        return f"the environment variable {_VARIABLE}"
    file = keys_file()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
        descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"default:af-{secrets.token_urlsafe(32)}\n")
        try:
            os.link(whole, file)
        except FileExistsError:
            pass  # another replica made one a moment ago: that one counts
        finally:
            whole.unlink()
    _read(file)
    return str(file)


def first_key() -> str:
    """A key for this machine's own tools, such as the quickstart and the benchmarks. Makes one where there is none."""
    ensure_keys()
    lines = os.environ[_VARIABLE].split(",") if os.environ.get(_VARIABLE) else keys_file().read_text(encoding="utf-8").splitlines()
    return next(line.strip().rpartition(":")[2] for line in lines if line.strip() and not line.lstrip().startswith("#"))


class ApiKeys:
    """Tells a key's tenant."""

    def __init__(self) -> None:
        ensure_keys()
        self._file = None if os.environ.get(_VARIABLE) else keys_file()
        self._stamp: tuple[int, int] | None = None
        self._checked_at = float("-inf")
        self._tenants: dict[bytes, str] = {}
        self._refresh()

    def tenant(self, key: str) -> str | None:
        """None: no such key."""
        self._refresh()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, tenant in self._tenants.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def _refresh(self) -> None:
        if self._file is None:
            if not self._tenants:
                self._tenants = _parse(os.environ[_VARIABLE].split(","), _VARIABLE)
            return
        now = time.monotonic()
        if now - self._checked_at < _RECHECK_S:
            return
        self._checked_at = now
        try:
            status = self._file.stat()
        except FileNotFoundError:
            self._tenants, self._stamp = {}, None  # the keys were taken away: nobody may call
            return
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._tenants = _read(self._file)
            self._stamp = stamp


def _read(file: Path) -> dict[bytes, str]:
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise ServingError(f"{file} is readable by others (mode {mode:o}). Run: chmod 600 {file}")
    return _parse(file.read_text(encoding="utf-8").splitlines(), str(file))


def _parse(lines: list[str], origin: str) -> dict[bytes, str]:
    """SHA-256 of each key to its tenant. ServingError lists all bad entries by number, without the keys."""
    tenants: dict[bytes, str] = {}
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        tenant, colon, key = text.partition(":")
        try:
            check_name(tenant)
        except ContractError:
            colon = ""
        if not colon:
            wrong.append(f"entry {number} is not of the form tenant:key with a safe tenant name")
        elif len(key) < _MIN_KEY_CHARS or any(character.isspace() for character in key):
            wrong.append(f"entry {number} (tenant {tenant}): a key has at least {_MIN_KEY_CHARS} characters and no blanks")
        else:
            tenants[hashlib.sha256(key.encode()).digest()] = tenant
    if wrong or not tenants:
        raise ServingError(f"{origin}: " + ("; ".join(wrong) or "no key in it; put a tenant:key there, or set auth: none") + ".")
    return tenants
