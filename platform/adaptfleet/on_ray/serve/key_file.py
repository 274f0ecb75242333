"""The file `api-keys` in the home: a key's record as JSON on each line, with the key's SHA-256 and never the key.

A line `tenant:key`, as earlier versions wrote it, is read too. The file is private to its owner, written whole, and read by every replica
again when it changes. Keys made here have 256 random bits, so that a fast hash hides them as well as a slow one would.

`client-key` beside it holds one key in the clear, private too: this machine's own tools, such as the quickstart, call with it.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from adaptfleet.contracts.errors import ContractError, ServingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.names import check_name, near
from adaptfleet.contracts.tenants import FIRST_TENANT, KeyRecord

VARIABLE = "ADAPTFLEET_API_KEYS"
_MIN_KEY_CHARS = 16


@dataclass(frozen=True)
class _Line:
    """A line of the file: what it says, and how it is written."""

    text: str
    record: KeyRecord | None
    """None: a comment."""


def keys_file() -> Path:
    return home() / "api-keys"


def client_key_file() -> Path:
    return home() / "client-key"


def read_keys() -> dict[str, KeyRecord]:
    """Records by the SHA-256 of their keys, from the environment or else the file. ServingError lists all bad entries, without the keys."""
    given = os.environ.get(VARIABLE)
    if given:
        lines = _parse(given.split(","), VARIABLE)
        found = {line.record.sha256: line.record for line in lines if line.record is not None}
        if not found:
            raise ServingError(f"{VARIABLE}: no key in it; put a tenant:key there, or set auth: none.")
        return found
    return {line.record.sha256: line.record for line in _read() if line.record is not None}


def add_key(tenant: str, models: tuple[str, ...] = ("*",), expires_at: datetime | None = None, note: str = "") -> tuple[str, KeyRecord]:
    """A new key, shown only now, and its record."""
    key = f"af-{secrets.token_urlsafe(32)}"
    record = _record(tenant, key, models, expires_at, note)
    with _locked():
        _write([*(_read() if keys_file().exists() else []), _Line(record.model_dump_json(), record)])
    return key, record


def rotate_key(key_id: str, grace: timedelta) -> tuple[str, KeyRecord, KeyRecord]:
    """A new key with the rights of an old one, which stays good for `grace`; both records."""
    with _locked():
        lines = _read()
        old = _find(lines, key_id)
        now = datetime.now(UTC)
        until = now + grace if old.expires_at is None else min(old.expires_at, now + grace)
        key = f"af-{secrets.token_urlsafe(32)}"
        new = _record(old.tenant, key, old.models, None, old.note)
        ended = old.model_copy(update={"expires_at": until})
        lines = [_Line(ended.model_dump_json(), ended) if line.record == old else line for line in lines]
        _write([*lines, _Line(new.model_dump_json(), new)])
    return key, new, ended


def revoke_key(key_id: str) -> KeyRecord:
    """The key is good no longer, within about a second."""
    with _locked():
        lines = _read()
        gone = _find(lines, key_id)
        _write([line for line in lines if line.record != gone])
    return gone


def hash_plain_keys() -> int:
    """Rewrites lines `tenant:key` as records without the key. Returns how many."""
    with _locked():
        lines = _read()
        new = [line if line.record is None else _Line(line.record.model_dump_json(), line.record) for line in lines]
        changed = sum(before.text != after.text for before, after in zip(lines, new, strict=True))
        if changed:
            _write(new)
    return changed


def ensure_keys() -> str:
    """Makes a key of the tenant `default` where there is none yet. Returns where the keys are, never the keys."""
    if os.environ.get(VARIABLE):
        read_keys()
        return f"the environment variable {VARIABLE}"
    if not keys_file().exists():
        with _locked():
            if not keys_file().exists():  # another replica may have made one a moment ago: that one counts
                key = f"af-{secrets.token_urlsafe(32)}"
                record = _record(FIRST_TENANT, key, ("*",), None, "made at the first start")
                _write_private(client_key_file(), f"{key}\n")
                _write([_Line(record.model_dump_json(), record)])
    if not any(line.record for line in _read()):
        raise ServingError(f"{keys_file()}: no key in it. Run: adaptfleet keys add {FIRST_TENANT} --save")
    return str(keys_file())


def first_key() -> str:
    """A key for this machine's own tools, such as the quickstart and the benchmarks. Makes one where there is none."""
    ensure_keys()
    given = os.environ.get(VARIABLE)
    lines = given.split(",") if given else keys_file().read_text(encoding="utf-8").splitlines()
    if not given and client_key_file().is_file():
        _refuse_open_mode(client_key_file())
        return client_key_file().read_text(encoding="utf-8").strip()
    plain = (line.strip().partition(":")[2] for line in lines if line.strip() and line.lstrip()[0] not in "#{")
    key = next(plain, None)
    if key is None:
        raise ServingError(
            f"{client_key_file()} is not there, and {keys_file()} holds no key in the clear. Run: adaptfleet keys add NAME --save"
        )
    return key


def save_client_key(key: str) -> None:
    with _locked():
        _write_private(client_key_file(), f"{key}\n")


def sha256_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _record(tenant: str, key: str, models: tuple[str, ...], expires_at: datetime | None, note: str) -> KeyRecord:
    digest = sha256_of(key)
    try:
        return KeyRecord(
            id=f"k-{digest[:10]}",
            tenant=tenant,
            sha256=digest,
            models=models,
            created_at=datetime.now(UTC).replace(microsecond=0),
            expires_at=expires_at,
            note=note,
        )
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors(include_url=False)
        )
        raise ContractError(f"no such key can be made: {said}") from None


def _read() -> list[_Line]:
    file = keys_file()
    try:
        _refuse_open_mode(file)
        return _parse(file.read_text(encoding="utf-8").splitlines(), str(file))
    except FileNotFoundError:
        raise ServingError(f"{file} is not there. Run: adaptfleet keys add {FIRST_TENANT} --save") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"{file} cannot be read: {error}.") from None


def _refuse_open_mode(file: Path) -> None:
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise ServingError(f"{file} is readable by others (mode {mode:o}). Run: chmod 600 {file}")


def _parse(lines: list[str], origin: str) -> list[_Line]:
    """ServingError lists all bad entries by number, without the keys."""
    parsed: list[_Line] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            parsed.append(_Line(line, None))
        elif text.startswith("{"):
            try:
                parsed.append(_Line(line, KeyRecord.model_validate_json(text)))
            except ValidationError as error:
                places = ", ".join(sorted({".".join(map(str, e["loc"])) or "the record" for e in error.errors(include_url=False)}))
                wrong.append(f"entry {number} is no key's record: look at {places}")
        else:
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
                digest = sha256_of(key)
                parsed.append(_Line(line, KeyRecord(id=f"k-{digest[:10]}", tenant=tenant, sha256=digest)))
    if wrong:
        raise ServingError(f"{origin}: " + "; ".join(wrong) + ".")
    return parsed


def _find(lines: list[_Line], key_id: str) -> KeyRecord:
    records = [line.record for line in lines if line.record is not None]
    for record in records:
        if record.id == key_id:
            return record
    known = [record.id for record in records]
    raise ContractError(f"no key has the id {key_id!r}.{near(key_id, known)} There is {', '.join(known) or 'none'}.")


@contextmanager
def _locked() -> Iterator[None]:
    if os.environ.get(VARIABLE):
        raise ContractError(f"the keys come from the environment variable {VARIABLE}. Unset it, or change the keys there.")
    lock = home() / ".api-keys.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(lines: list[_Line]) -> None:
    _write_private(keys_file(), "".join(f"{line.text}\n" for line in lines))


def _write_private(file: Path, text: str) -> None:
    whole = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        whole.replace(file)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise
