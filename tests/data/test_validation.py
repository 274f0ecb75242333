"""`adaptfleet validate`: every kind of offender is found, counted and named, on the table and on the page."""

import itertools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptfleet.cli import main
from adaptfleet.cli.validation_page import page
from adaptfleet.contracts.data import DataSpec
from adaptfleet.core.data import files, validation
from adaptfleet.core.data.token_cache import Encoder
from adaptfleet.core.data.validation import Finding, Validation, statistics, validate
from tests.training.conftest import sums_file, tiny_base  # noqa: F401  fixtures

MakeTokenizer = Callable[..., Any]


def chat(*contents: str, first: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def checked(make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Validation]:
    monkeypatch.setattr(files, "SPAN_ROWS", 8)
    monkeypatch.setattr(validation, "SPAN_ROWS", 8)

    def check(max_tokens: int = 60, truncate: bool = False, **spec: Any) -> Validation:
        return validate(DataSpec.model_validate(spec), Encoder(make_tokenizer(), max_tokens, truncate))

    return check


def found(result: Validation) -> dict[str, Finding]:
    return {finding.fact: finding for finding in result.findings}


GOOD = [chat(f"q{i}", f"answer {i}") for i in range(40)]


def test_good_rows_are_only_measured(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    result = checked(train=str(write(tmp_path / "a.jsonl", GOOD)))
    assert result.findings == () and result.is_trainable
    train, held_out = result.sides
    assert len(train.lengths) + len(held_out.lengths) == 40
    assert sum(bar.count for bar in train.histogram()) == len(train.lengths)
    table = {row[0]: row[1:] for row in statistics(result)}
    assert table["rows"] == (f"{len(train.lengths)}", f"{len(held_out.lengths)}")
    # Byte-level tokens: the answer's letters and the end of the turn.
    labels = sum(len(f"answer {i}") + 1 for i in range(40))
    assert int(train.labels.sum() + held_out.labels.sum()) == labels
    assert table["tokens of a row, most"][0] == str(train.lengths.max())


def test_every_kind_of_offender_is_found_and_named(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    rows: list[Any] = [
        *GOOD,
        "no json",  # line 41
        chat("a", "b", first="assistant"),
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
        chat("only a question"),
        chat("q", " "),
        {"messages": [{"role": "tool", "content": "x"}]},
        {"txt": "x"},
        chat("q", "x" * 90),  # line 48
        chat("q<|im_start|>", "answer"),
        chat("short", "7"),
        GOOD[3],  # line 51
        GOOD[3],
    ]
    result = checked(train=str(write(tmp_path / "a.jsonl", rows)), test_fraction=0.05)
    source = tmp_path / "a.jsonl"
    offenders = {
        f"lines that are no JSON in {source}": ["line 41: "],
        f"rows with roles mixed up in {source}": ["line 42: ", "line 43: ", "line 44: "],
        f"rows with an empty message in {source}": ["line 45: "],
        f"rows with tool calls in {source}": ["line 46: "],
        f"rows of no known form in {source}": ["line 47: "],
        "rows that hold the template's control tokens": ["a.jsonl, line 49: messages[0] holds '<|im_start|>'"],
    }
    findings = found(result)
    for fact, starts in offenders.items():
        finding = findings[fact]
        assert finding.is_fatal and finding.count == len(starts)
        assert all(line.startswith(start) for line, start in zip(finding.shown, starts, strict=True)), finding
    too_long = next(f for f in result.findings if f.fact.startswith("rows longer than 60 tokens"))
    assert too_long.is_fatal and too_long.shown == ("a.jsonl, line 48: 112 tokens",)
    twice = [f for f in result.findings if "equal an earlier one" in f.fact]
    assert [(f.is_fatal, f.count, f.shown) for f in twice] == [
        (False, 2, ("a.jsonl, line 51 = a.jsonl, line 4", "a.jsonl, line 52 = a.jsonl, line 4"))
    ]
    assert findings["rows whose answer has fewer than 2 characters"].shown == ("a.jsonl, line 50: '7'",)
    assert not result.is_trainable


def test_rows_to_be_cut_are_a_note_and_rows_left_without_an_answer_an_error(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    rows = [*GOOD, chat("q", "x" * 90), chat("q" * 90, "answer")]
    result = checked(train=str(write(tmp_path / "a.jsonl", rows)), truncate=True)
    findings = found(result)
    assert not findings["rows that will be cut at 60 tokens"].is_fatal and findings["rows that will be cut at 60 tokens"].count == 2
    assert findings["rows without an answer within 60 tokens"].is_fatal and findings["rows without an answer within 60 tokens"].count == 1


def test_prompts_on_both_sides_are_an_error(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    test = write(tmp_path / "t.jsonl", [chat("new", "answer"), chat("Q3", "another")])
    result = checked(train=str(write(tmp_path / "a.jsonl", GOOD)), test=str(test))
    (leak,) = result.findings
    assert leak.is_fatal and "1 of 2 held-out rows in" in leak.fact
    assert leak.shown == ("t.jsonl, line 2 = a.jsonl, line 4: 'Q3'",)


def test_many_offenders_are_counted_and_the_first_fifty_shown(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    result = checked(train=str(write(tmp_path / "a.jsonl", [*GOOD, *(chat(f"q {i}", "x" * 90) for i in range(70))])))
    (too_long,) = (f for f in result.findings if f.fact.startswith("rows longer"))
    assert too_long.count == 70 and len(too_long.shown) == 50 and too_long.lines[-1] == "... and 20 more"


def test_nothing_usable_is_reported_and_no_crash(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    result = checked(train=str(write(tmp_path / "a.jsonl", ["[", "{}"])))
    assert not result.is_trainable and {f.count for f in result.findings if f.count} == {1}
    assert all(not len(side.lengths) for side in result.sides)
    assert "<svg" not in page(result, "c.yaml")
    empty = checked(train=str(write(tmp_path / "b.jsonl", [])))
    assert any("has no rows" in f.fact for f in empty.findings)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert all(name not in ("src", "href") and not name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_shows_data_as_text(tmp_path: Path, checked: Callable[..., Validation]) -> None:
    evil = "<script>alert(1)</script>"
    rows = [*GOOD, {evil: "x"}, chat("w", "<"), chat(evil + "x" * 90, "answer")]
    result = checked(train=str(write(tmp_path / "a & b.jsonl", rows)))
    text = page(result, f"{evil}.yaml")
    parsed = _Page(text)
    assert "script" not in parsed.tags and parsed.tags.count("svg") == 4 and "rect" in parsed.tags
    assert evil in parsed.text and "a & b.jsonl" in parsed.text and "cannot be trained on" in parsed.text
    assert "prefers-color-scheme: dark" in text and "http:" not in text and "https:" not in text


def test_histogram_bars_cover_all_lengths() -> None:
    side = validation.SideStatistics("x", [np.asarray([5, 5, 9, 300], dtype=np.int32)], [])
    bars = side.histogram()
    assert sum(bar.count for bar in bars) == 4 and bars[0].first == 5 and bars[-1].last >= 300
    assert all(a.last + 1 == b.first for a, b in itertools.pairwise(bars))


def test_the_command_says_by_its_status_whether_the_data_can_be_trained_on(
    tmp_path: Path,
    fresh_home: Path,
    tiny_base: Path,  # noqa: F811
    sums_file: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    contract = tmp_path / "job.yaml"
    contract.write_text(f"model: {{source: {tiny_base}}}\ndata: {{train: {sums_file}}}\npublish: {{name: a}}\n")
    assert main(["validate", "--config", str(contract), "--html", str(tmp_path / "report.html")]) == 0
    out = capsys.readouterr().out
    assert "rows\t" in out and "This can be trained on." in out
    assert _Page((tmp_path / "report.html").read_text()).tags.count("svg") == 4
    assert main(["validate", "--config", str(contract), "--set", "train.pack_tokens=16"]) == 2
    out = capsys.readouterr().out
    assert "ERROR: 144 rows longer than 16 tokens" in out and "sums.jsonl, line 1: " in out
    assert main(["validate", "--config", str(contract), "--set", "data.train=missing.jsonl"]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
