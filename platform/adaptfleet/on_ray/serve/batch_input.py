"""A batch's input, checked whole before its first row runs: every mistake with its line, in the form that OpenAI's API has for them."""

import json
from dataclasses import dataclass
from typing import Any

from adaptfleet.store.batches import RowError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_ROWS = 50_000
_MAX_ERRORS = 100
_MAX_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class Row:
    custom_id: str
    body: dict[str, Any]


def parse_rows(content: bytes, endpoint: str) -> tuple[list[Row], list[RowError]]:
    """The rows, or what is wrong: up to a hundred mistakes."""
    rows: list[Row] = []
    wrong: list[RowError] = []
    seen: set[str] = set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        found = _row(line, endpoint, seen)
        if isinstance(found, Row):
            seen.add(found.custom_id)
            rows.append(found)
        else:
            code, message, param = found
            wrong.append(RowError(code=code, message=message, line=number, param=param))
        if len(rows) > MAX_ROWS:
            return [], [RowError(code="too_many_rows", message=f"A batch has at most {MAX_ROWS} rows. Split the file.", line=number)]
        if len(wrong) == _MAX_ERRORS:
            break
    if not rows and not wrong:
        wrong.append(RowError(code="empty_file", message="The file has no rows."))
    return (rows, []) if not wrong else ([], wrong)


def _row(line: bytes, endpoint: str, seen: set[str]) -> Row | tuple[str, str, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "invalid_json_line", "The line is no JSON.", None
    if not isinstance(row, dict):
        return "invalid_json_line", "The line is no JSON object.", None
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_CHARS:
        return "invalid_custom_id", f"custom_id is a string of 1 to {_MAX_ID_CHARS} characters.", "custom_id"
    if custom_id in seen:
        return "duplicate_custom_id", f"custom_id {custom_id[:80]!r} stands on an earlier line too.", "custom_id"
    if row.get("method") != "POST":
        return "invalid_method", "method is POST.", "method"
    if row.get("url") != endpoint:
        return "mismatched_url", f"url is the batch's endpoint, {endpoint}.", "url"
    if not isinstance(body, dict):
        return "invalid_body", "body is an object.", "body"
    if body.get("stream"):
        return "invalid_body", "A batch's rows are not streamed; leave stream out.", "body.stream"
    return Row(custom_id, body)
