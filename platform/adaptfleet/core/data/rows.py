"""Reading rows from JSONL and Parquet: every bad row is reported, with its line and the reason.

Three forms, told apart by their keys:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.names import near
from adaptfleet.core.data.examples import Example, Message

MAX_SHOWN = 50
"""Bad rows shown in one error; the count is of all."""
HARMLESS_KEYS = frozenset({"id", "metadata"})
"""Keys of a row that are read by nobody here and that may stand there."""
FORMS = (frozenset({"messages"}), frozenset({"prompt", "completion"}), frozenset({"text"}))
_FORM_KEYS = sorted(frozenset().union(*FORMS))
_WAYS = "a row has `messages`, or `prompt` and `completion`, or `text`"
SUFFIXES = (".jsonl", ".parquet")


class _BadRowError(Exception):
    """The reason why a row cannot be used."""


def read_rows(path: str | Path) -> list[Example]:
    """The examples of a `.jsonl` or `.parquet` file, in the file's order.

    DataError: no such file, another kind of file, no rows, or bad rows (all counted, the first 50 shown).
    """
    file = Path(path).expanduser()
    _check_file(file)
    examples: list[Example] = []
    shown: list[str] = []
    num_bad = 0
    unit = "line" if file.suffix == ".jsonl" else "row"
    for number, row in _jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file):
        try:
            if isinstance(row, _BadRowError):
                raise row
            examples.append(parse_row(row, origin=f"{file.name}, {unit} {number}"))
        except _BadRowError as bad:
            num_bad += 1
            if len(shown) < MAX_SHOWN:
                shown.append(f"  {unit} {number}: {bad}")
    if num_bad:
        rest = [f"  ... and {num_bad - len(shown)} more"] if num_bad > len(shown) else []
        rows = "1 row" if num_bad == 1 else f"{num_bad} rows"
        raise DataError("\n".join([f"{file}: {rows} of {num_bad + len(examples)} cannot be used.", *shown, *rest]))
    if not examples:
        raise DataError(f"{file} has no rows; {_WAYS}.")
    return examples


def num_duplicates(examples: list[Example]) -> int:
    """How many examples equal an earlier one."""
    return len(examples) - len(set(examples))


def parse_row(row: Any, origin: str = "") -> Example:
    """One row as an example. Raises the reason why it is none."""
    if not isinstance(row, dict):
        raise _BadRowError(f"holds {_kind(row)}, not an object with keys; {_WAYS}.")
    row = {key: value for key, value in row.items() if value is not None}
    unknown = sorted(set(row) - set(_FORM_KEYS) - HARMLESS_KEYS)
    if unknown:
        hints = "".join(near(key, _FORM_KEYS) for key in unknown)
        raise _BadRowError(
            f"unknown {_listed('key', unknown)}.{hints} Allowed: {', '.join(_FORM_KEYS)}, and {', '.join(sorted(HARMLESS_KEYS))}."
        )
    keys = frozenset(row) - HARMLESS_KEYS
    if keys not in FORMS:
        raise _BadRowError(f"has the {_listed('key', sorted(keys))}, but {_WAYS}." if keys else f"has no content; {_WAYS}.")
    if "text" in row:
        return Example(text=_content(row["text"], "text"), origin=origin)
    if "messages" in row:
        return Example(_messages(row["messages"]), origin=origin)
    prompt, completion = _content(row["prompt"], "prompt"), _content(row["completion"], "completion")
    return Example((Message("user", prompt), Message("assistant", completion)), plain=True, origin=origin)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadRowError(f"`messages` is {_kind(value)}, not a list of messages with role and content.")
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))
    turns = [m.role for m in messages]
    start = 1 if turns[0] == "system" else 0
    for i, role in enumerate(turns[start:], start):
        expected = "user" if (i - start) % 2 == 0 else "assistant"
        if role != expected:
            why = "a system message stands first" if role == "system" else "user and assistant take turns, the user first"
            raise _BadRowError(f"messages[{i}] is of the role {role!r} where {expected!r} is due: {why}.")
    if turns[-1] != "assistant":
        raise _BadRowError(f"the last message is of the role {turns[-1]!r}; it must be the assistant's answer.")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise _BadRowError(f"{where} is {_kind(item)}, not an object with role and content.")
    item = {key: value for key, value in item.items() if value is not None}
    role = item.get("role")
    if role in ("tool", "function") or "tool_calls" in item or "function_call" in item:
        raise _BadRowError(
            f"{where} belongs to a tool call; only system, user and assistant messages can be trained on. Leave such rows out."
        )
    unknown = sorted(set(item) - {"role", "content"})
    if unknown:
        raise _BadRowError(f"{where} has the unknown {_listed('key', unknown)}. Allowed: role, content.")
    if role not in ("system", "user", "assistant"):
        raise _BadRowError(f"{where} has {'no role' if role is None else f'the role {role!r}'}. Allowed: system, user, assistant.")
    return Message(role, _content(item.get("content"), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    if isinstance(value, list):
        raise _BadRowError(f"{where} is a list of parts; give one string (images and other parts cannot be trained on).")
    if not isinstance(value, str):
        raise _BadRowError(f"{where} is {_kind(value)}, not a string.")
    if not value.strip():
        raise _BadRowError(f"{where} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"{where} holds half of a surrogate pair, which is no character.") from None
    return value


def _check_file(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise DataError(f"{file} is neither {' nor '.join(SUFFIXES)}; convert it to one of these.")
    if not file.exists():
        beside = sorted(p.name for p in file.parent.glob("*") if p.suffix in SUFFIXES) if file.parent.is_dir() else None
        if beside is None:
            raise DataError(f"no file {file.absolute()}: the folder {file.parent.absolute()} does not exist either.")
        there = f" The folder has {', '.join(beside[:10])}." if beside else " The folder has no .jsonl or .parquet file."
        raise DataError(f"no file {file.absolute()}.{near(file.name, beside)}{there}")
    if not file.is_file():
        raise DataError(f"{file} is a folder; name a {' or '.join(SUFFIXES)} file in it.")


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and parsed lines, or the reason why a line cannot be parsed. Blank lines are passed over."""
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if number == 1:
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError(f"{file} is UTF-16 text; save it as UTF-8.")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield number, _parse_line(raw.rstrip(b"\r\n"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}.") from None


def _parse_line(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _BadRowError(f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is no UTF-8.")
    except json.JSONDecodeError as error:
        hint = " JSONL has one whole object on each line, not one array over many." if raw.strip() in (b"[", b"{") else ""
        return _BadRowError(f"no JSON: {error.msg} at column {error.colno}.{hint}")
    except RecursionError:
        return _BadRowError("no usable JSON: it is nested too deeply.")
    except _BadRowError as bad:
        return bad


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _BadRowError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object.")
    return row


def _no_constant(name: str) -> Any:
    raise _BadRowError(f"{name} is no JSON.")


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Row numbers from 1 and rows, a batch in memory at a time."""
    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            for batch in parquet.iter_batches(batch_size=1024):
                # A file without columns has rows without content.
                for row in batch.to_pylist() if names else [{}] * batch.num_rows:
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no readable Parquet file: {str(error).splitlines()[0]}") from None


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(noun: str, items: list[str]) -> str:
    return f"{noun if len(items) == 1 else noun + 's'} {', '.join(repr(item) for item in items)}"
