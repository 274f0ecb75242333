"""One row as an example, or the reason why it is none.

Four forms, told apart by their keys:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
    {"prompt": "...", "chosen": "...", "rejected": "..."}      the prompt may be a list of messages
"""

import json
from typing import Any, Literal

from adaptfleet.contracts.names import near
from adaptfleet.core.data.examples import Example, Message

HARMLESS_KEYS = frozenset({"id", "metadata"})
"""Keys of a row that are read by nobody here and that may stand there."""
FORMS = (frozenset({"messages"}), frozenset({"prompt", "completion"}), frozenset({"text"}), frozenset({"prompt", "chosen", "rejected"}))
_FORM_KEYS = sorted(frozenset().union(*FORMS))
WAYS = "a row has `messages`, or `prompt` and `completion`, or `text`, or `prompt`, `chosen` and `rejected`"

Fault = Literal["json", "form", "roles", "empty", "tools"]


class BadRowError(Exception):
    """The reason why a row cannot be used, and of what kind it is."""

    def __init__(self, reason: str, fault: Fault = "form") -> None:
        super().__init__(reason)
        self.fault: Fault = fault


def parse_row(row: Any, origin: str = "") -> Example:
    """One row as an example. Raises the reason why it is none."""
    if not isinstance(row, dict):
        raise BadRowError(f"holds {_kind(row)}, not an object with keys; {WAYS}.")
    row = {key: value for key, value in row.items() if value is not None}
    unknown = sorted(set(row) - set(_FORM_KEYS) - HARMLESS_KEYS)
    if unknown:
        hints = "".join(near(key, _FORM_KEYS) for key in unknown)
        raise BadRowError(
            f"unknown {_listed('key', unknown)}.{hints} Allowed: {', '.join(_FORM_KEYS)}, and {', '.join(sorted(HARMLESS_KEYS))}."
        )
    keys = frozenset(row) - HARMLESS_KEYS
    if keys not in FORMS:
        raise BadRowError(f"has the {_listed('key', sorted(keys))}, but {WAYS}." if keys else f"has no content; {WAYS}.")
    if "text" in row:
        return Example(text=_content(row["text"], "text"), origin=origin)
    if "messages" in row:
        return Example(_messages(row["messages"]), origin=origin)
    if "chosen" in row:
        return _preference(row, origin)
    prompt, completion = _content(row["prompt"], "prompt"), _content(row["completion"], "completion")
    return Example((Message("user", prompt), Message("assistant", completion)), plain=True, origin=origin)


def _preference(row: dict[str, Any], origin: str) -> Example:
    chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
    if chosen == rejected:
        raise BadRowError("chosen and rejected are the same answer, so nothing is preferred.")
    last = Message("assistant", chosen)
    if isinstance(row["prompt"], list):
        return Example(_messages([*row["prompt"], {"role": "assistant", "content": chosen}]), rejected=rejected, origin=origin)
    return Example((Message("user", _content(row["prompt"], "prompt")), last), plain=True, rejected=rejected, origin=origin)


def _answer(value: Any, where: str) -> str:
    """A string, or a list of one assistant message."""
    if isinstance(value, list) and len(value) == 1:
        message = _message(value[0], f"{where}[0]")
        if message.role != "assistant":
            raise BadRowError(f"{where}[0] is of the role {message.role!r}; it must be the assistant's answer.", "roles")
        return message.content
    return _content(value, where)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"`messages` is {_kind(value)}, not a list of messages with role and content.")
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))
    turns = [m.role for m in messages]
    start = 1 if turns[0] == "system" else 0
    for i, role in enumerate(turns[start:], start):
        expected = "user" if (i - start) % 2 == 0 else "assistant"
        if role != expected:
            why = "a system message stands first" if role == "system" else "user and assistant take turns, the user first"
            raise BadRowError(f"messages[{i}] is of the role {role!r} where {expected!r} is due: {why}.", "roles")
    if turns[-1] != "assistant":
        raise BadRowError(f"the last message is of the role {turns[-1]!r}; it must be the assistant's answer.", "roles")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadRowError(f"{where} is {_kind(item)}, not an object with role and content.")
    item = {key: value for key, value in item.items() if value is not None}
    role = item.get("role")
    if role in ("tool", "function") or "tool_calls" in item or "function_call" in item:
        raise BadRowError(
            f"{where} belongs to a tool call; only system, user and assistant messages can be trained on. Leave such rows out.",
            "tools",
        )
    unknown = sorted(set(item) - {"role", "content"})
    if unknown:
        raise BadRowError(f"{where} has the unknown {_listed('key', unknown)}. Allowed: role, content.")
    if role not in ("system", "user", "assistant"):
        raise BadRowError(f"{where} has {'no role' if role is None else f'the role {role!r}'}. Allowed: system, user, assistant.", "roles")
    return Message(role, _content(item.get("content"), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    if isinstance(value, list):
        raise BadRowError(f"{where} is a list of parts; give one string (images and other parts cannot be trained on).")
    if not isinstance(value, str):
        raise BadRowError(f"{where} is {_kind(value)}, not a string.", "empty" if value is None else "form")
    if not value.strip():
        raise BadRowError(f"{where} is empty.", "empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{where} holds half of a surrogate pair, which is no character.") from None
    return value


def parse_line(raw: bytes) -> Any:
    """The value of a line of JSONL, or the BadRowError that says why it has none."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return BadRowError(f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is no UTF-8.", "json")
    except json.JSONDecodeError as error:
        hint = " JSONL has one whole object on each line, not one array over many." if raw.strip() in (b"[", b"{") else ""
        return BadRowError(f"no JSON: {error.msg} at column {error.colno}.{hint}", "json")
    except RecursionError:
        return BadRowError("no usable JSON: it is nested too deeply.", "json")
    except BadRowError as bad:
        return bad


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRowError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object.", "json")
    return row


def _no_constant(name: str) -> Any:
    raise BadRowError(f"{name} is no JSON.", "json")


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
