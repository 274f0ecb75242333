import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.data.rows import num_duplicates, read_rows

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
CHAT_EXAMPLE = Example((Message("user", "2+2?"), Message("assistant", "4")))


def jsonl(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(file)
    return str(caught.value)


def test_the_three_forms(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, CHAT, {"prompt": "a", "completion": " b", "id": 7}, {"text": "c", "metadata": {"from": "x"}}))
    assert rows == [CHAT_EXAMPLE, Example((Message("user", "a"), Message("assistant", " b")), plain=True), Example(text="c")]
    assert [row.origin for row in rows] == ["rows.jsonl, line 1", "rows.jsonl, line 2", "rows.jsonl, line 3"]


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, CHAT, {"prompt": "a", "completion": " b"}, {"text": "c"}))
    assert read_rows(jsonl(tmp_path, *(row.as_row() for row in rows))) == rows


def test_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    line = json.dumps(CHAT).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    rows = read_rows(file)
    assert rows == [CHAT_EXAMPLE, CHAT_EXAMPLE]
    assert rows[1].origin == "rows.jsonl, line 4"
    assert num_duplicates(rows) == 1


def test_parquet_gives_the_same_rows_and_null_columns_count_as_absent(tmp_path: Path) -> None:
    columns = {
        "messages": [CHAT["messages"], None, None],
        "prompt": [None, "a", None],
        "completion": [None, "b", None],
        "text": [None, None, "c"],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows == [CHAT_EXAMPLE, Example((Message("user", "a"), Message("assistant", "b")), plain=True), Example(text="c")]
    assert rows[2].origin == "rows.parquet, row 3"


def chat(*roles_and_contents: object) -> dict[str, object]:
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles_and_contents[::2], roles_and_contents[1::2], strict=True)]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "holds a list, not an object"),
        ({}, "has no content"),
        ({"id": 1}, "has no content"),
        (
            {"mesages": []},
            "unknown key 'mesages'. Did you mean 'messages'? "
            "Allowed: chosen, completion, messages, prompt, rejected, text, and id, metadata.",
        ),
        ({"prompt": "a"}, "has the key 'prompt', but a row has"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "has the keys 'completion', 'prompt', 'text', but"),
        ({"prompt": "a", "completion": "  "}, "completion is empty"),
        ({"text": 5}, "text is 5, not a string"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": ["hi"]}, "messages[0] is 'hi', not an object"),
        ({"messages": [{"content": "a"}]}, "messages[0] has no role. Allowed: system, user, assistant."),
        (chat("bot", "a"), "messages[0] has the role 'bot'. Allowed: system, user, assistant."),
        (chat("user", "a", "tool", "b"), "messages[1] belongs to a tool call"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0] belongs to a tool call"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0] has the unknown key 'weight'"),
        (chat("assistant", "a"), "messages[0] is of the role 'assistant' where 'user' is due"),
        (chat("user", "a", "system", "b"), "messages[1] is of the role 'system' where 'assistant' is due: a system message stands first"),
        (chat("user", "a", "user", "b"), "user and assistant take turns"),
        (chat("user", "a"), "the last message is of the role 'user'"),
        (chat("system", "a"), "the last message is of the role 'system'"),
        (chat("user", [{"type": "text", "text": "a"}], "assistant", "b"), "messages[0].content is a list of parts"),
        (chat("user", "a", "assistant", None), "messages[1].content is missing, not a string"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(tmp_path: Path, row: object, reason: str) -> None:
    message = refusal(jsonl(tmp_path, CHAT, row))
    assert "1 row of 2 cannot be used" in message
    assert "\n  line 2: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "no JSON: Expecting ',' delimiter at column 13"),
        (b"[", "JSONL has one whole object on each line"),
        (b'{"text": "\xff"}', "byte 11 of the line (0xff) is no UTF-8"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        (b'{"text": NaN}', "NaN is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_json_says_why(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(CHAT).encode() + b"\n" + line + b"\n")
    message = refusal(file)
    assert "\n  line 2: " in message
    assert reason in message


def test_all_bad_rows_are_counted_and_the_first_fifty_shown(tmp_path: Path) -> None:
    message = refusal(jsonl(tmp_path, CHAT, *({"text": i} for i in range(60))))
    assert "60 rows of 61 cannot be used" in message
    assert message.count("\n  line ") == 50
    assert "line 51: " in message
    assert message.endswith("... and 10 more")


def test_bad_rows_of_parquet_are_named_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "", "c"]}), tmp_path / "rows.parquet")
    assert "\n  row 2: text is empty." in refusal(tmp_path / "rows.parquet")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "has no rows; a row has `messages`" in refusal(tmp_path / "empty.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    assert "is no readable Parquet file" in refusal(tmp_path / "broken.parquet")
    (tmp_path / "utf16.jsonl").write_bytes(json.dumps(CHAT).encode("utf-16"))
    assert "is UTF-16 text; save it as UTF-8" in refusal(tmp_path / "utf16.jsonl")
    assert "is neither .jsonl nor .parquet" in refusal(tmp_path / "rows.csv")
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.jsonl")


def test_a_missing_file_names_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    jsonl(tmp_path, CHAT)
    message = refusal(tmp_path / "row.jsonl")
    assert f"no file {tmp_path / 'row.jsonl'}" in message
    assert "Did you mean 'rows.jsonl'?" in message
    assert "does not exist either" in refusal(tmp_path / "nowhere" / "rows.jsonl")
