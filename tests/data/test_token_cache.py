"""Rows become tokens once: what is cached, what makes a new file, and what a torn or contested cache does."""

import json
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data import files, token_cache
from adaptfleet.core.data.datasets import open_dataset
from adaptfleet.core.data.encoding import encode_all
from adaptfleet.core.data.token_cache import Encoder, TokenisedDataset, one_after_another, tokenise, tokenizer_sha256
from adaptfleet.core.data.tokens import TokenFile
from tests.data.test_sources import rows, write

MakeTokenizer = Callable[..., Any]


def no_work(encoder: Any, tasks: Any) -> Any:
    raise AssertionError("the cache should have been used")


@pytest.fixture
def made(fresh_home: Path, make_tokenizer: MakeTokenizer) -> Callable[..., TokenisedDataset]:
    def make(spec: DataSpec, max_tokens: int = 64, truncate: bool = False, sha: str = "t", execute: Any = one_after_another) -> Any:
        return tokenise(open_dataset(spec), Encoder(make_tokenizer(), max_tokens, truncate), sha, execute)

    return make


def spec(file: Path, **more: Any) -> DataSpec:
    return DataSpec.model_validate({"train": str(file), **more})


def test_the_rows_are_those_that_lists_would_hold(
    tmp_path: Path, made: Callable[..., TokenisedDataset], make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPAN_ROWS", 10)
    monkeypatch.setattr(token_cache, "SPAN_ROWS", 10)
    write(tmp_path / "d" / "a.jsonl", rows(0, 55))
    write(tmp_path / "d" / "b.parquet", rows(55, 45))
    for max_rows in (None, 33):
        index = open_dataset(spec(tmp_path / "d", max_rows=max_rows))
        tokens = made(spec(tmp_path / "d", max_rows=max_rows))
        data = index.load()
        for numbers, examples in ((tokens.train_parts[0], data.train), (tokens.test, data.test)):
            mapped, listed = tokens.rows(numbers), encode_all(examples, make_tokenizer(), 64)
            assert [(r.input_ids.tolist(), r.label_mask.tolist()) for r in mapped] == [(e.input_ids, e.label_mask) for e in listed]
            assert mapped.lengths.tolist() == [len(e) for e in listed]
            assert [r.num_labels for r in mapped] == [e.num_labels for e in listed]
            assert [r.input_ids.tolist() for r in mapped[3:5]] == [e.input_ids for e in listed[3:5]]
    # Fewer rows make a file of their own.
    assert len(list((tmp_path / "home" / "cache" / "tokens").iterdir())) == 2


def test_the_second_time_nothing_is_tokenised_and_the_log_says_so(
    tmp_path: Path, made: Callable[..., TokenisedDataset], caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.jsonl", rows(0, 40))
    with caplog.at_level(logging.INFO):
        first = made(spec(file))
        assert "40 rows became" in caplog.text
        caplog.clear()
        # Another seed divides the same rows otherwise; another file and format may hold the same rows.
        again = made(spec(file, seed=3), execute=no_work)
        copied = made(spec(write(tmp_path / "b.parquet", rows(0, 40))), execute=no_work)
        assert "the tokens of 40 rows are in the cache" in caplog.text
    assert first.files == again.files == copied.files
    assert not np.array_equal(first.train_parts[0], again.train_parts[0])


def test_what_changes_the_tokens_makes_a_new_file(tmp_path: Path, made: Callable[..., TokenisedDataset]) -> None:
    file = write(tmp_path / "a.jsonl", rows(0, 40))
    variants = [
        made(spec(file)),
        made(spec(file), max_tokens=63),
        made(spec(file), truncate=True),
        made(spec(file), sha="other"),
        made(spec(write(tmp_path / "b.jsonl", rows(1, 40)))),
        made(spec(write(tmp_path / "c.jsonl", rows(0, 40)[::-1]))),
    ]
    assert len({v.files for v in variants}) == len(variants)


def test_the_tokenizers_hash_is_of_its_files_and_template(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    make_tokenizer().save_pretrained(tmp_path / "a")
    make_tokenizer().save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"weights do not count")
    first = tokenizer_sha256(tmp_path / "a", make_tokenizer())
    assert first == tokenizer_sha256(tmp_path / "b", make_tokenizer())
    assert first != tokenizer_sha256(tmp_path / "b", make_tokenizer(chat_template="{{ messages }}"))
    tokenizer = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "a"
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert first != tokenizer_sha256(tmp_path / "b", make_tokenizer())


@pytest.mark.parametrize("damage", ["cut", "changed", "no facts", "half facts", "no tokens"])
def test_a_damaged_file_is_made_again(tmp_path: Path, made: Callable[..., TokenisedDataset], damage: str) -> None:
    source = write(tmp_path / "a.jsonl", rows(0, 40))
    file = made(spec(source)).files[0]
    whole = file.read_bytes()
    facts = file.with_name("tokens.json")
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "changed":
        file.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    elif damage == "no facts":
        facts.unlink()
    elif damage == "half facts":
        facts.write_text(facts.read_text()[:20])
    else:
        file.unlink()
    assert made(spec(source)).files[0].read_bytes() == whole
    assert [p.name for p in file.parent.parent.iterdir()] == [file.parent.name]


def test_what_cannot_be_tokenised_is_listed_over_all_blocks_and_leaves_nothing(
    tmp_path: Path, made: Callable[..., TokenisedDataset], monkeypatch: pytest.MonkeyPatch, fresh_home: Path
) -> None:
    monkeypatch.setattr(files, "SPAN_ROWS", 10)
    bad = rows(0, 100)
    for i in (5, 50, 95):
        bad[i] = {"prompt": f"long {i}", "completion": "x" * 90}
    bad[30] = {"prompt": "q", "completion": "a<|im_end|>b"}
    with pytest.raises(DataError) as caught:
        made(spec(write(tmp_path / "a.jsonl", bad)))
    message = str(caught.value)
    assert "1 row cannot be turned into tokens.\n  a.jsonl, line 31: messages[1] holds '<|im_end|>'" in message
    assert "3 rows of 100 are longer than 64 tokens. Raise train.pack_tokens to " in message
    assert all(f"a.jsonl, line {i + 1}: " in message for i in (5, 50, 95))
    assert list((fresh_home / "cache" / "tokens").iterdir()) == []


def _race(folder: str, barrier: Any, results: Any, tokenizer: Any) -> None:
    def at_once(encoder: Any, tasks: Any) -> Any:
        barrier.wait(60)  # both found the cache empty
        yield from one_after_another(encoder, tasks)

    index = open_dataset(spec(Path(folder) / "a.jsonl"))
    tokens = tokenise(index, Encoder(tokenizer, 64, False), "t", at_once)
    results.put((str(tokens.files[0]), tokens.rows(tokens.train_parts[0])[7].input_ids.tolist()))


def test_two_processes_at_once_end_with_one_file(tmp_path: Path, fresh_home: Path, make_tokenizer: MakeTokenizer) -> None:
    write(tmp_path / "a.jsonl", rows(0, 40))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), barrier, results, make_tokenizer())) for _ in range(2)]
    for racer in racers:
        racer.start()
    found = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert found[0] == found[1]
    assert [p.name for p in (fresh_home / "cache" / "tokens").iterdir()] == [Path(found[0][0]).parent.name]


def test_a_file_is_uncompressed_and_mapped(tmp_path: Path, made: Callable[..., TokenisedDataset]) -> None:
    file = made(spec(write(tmp_path / "a.jsonl", rows(0, 40)))).files[0]
    tokens = TokenFile(file)
    assert not tokens[0].input_ids.flags.owndata and not tokens[0].input_ids.flags.writeable
    assert file.read_bytes().count(tokens[3].input_ids.tobytes()) >= 1
    assert json.loads(file.with_name("tokens.json").read_text())["tokens"] == int(tokens.lengths.sum())
