"""Tokenising on the cluster: the same files as in one process, byte for byte, and the same faults."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data import files
from adaptfleet.core.data.datasets import open_dataset
from adaptfleet.core.data.token_cache import Encoder, one_after_another, tokenise
from adaptfleet.on_ray.data.execution import LOCAL_ROWS, choose_execution
from tests.data.test_sources import rows, write
from tests.training.conftest import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def on_cluster() -> Any:
    joined: list[bool] = []
    execute = choose_execution("ray", 1, lambda: joined.append(True))
    assert not joined  # a cluster is started only where there is something to tokenise
    return execute


def test_the_files_are_those_of_one_process(
    local_cluster: Any, fresh_home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPAN_ROWS", 50)
    write(tmp_path / "d" / "a.jsonl", rows(0, 420))
    write(tmp_path / "d" / "b.parquet", rows(420, 130))
    index = open_dataset(DataSpec(train=str(tmp_path / "d"), max_rows=400))
    found = []
    for number, execute in enumerate((one_after_another, on_cluster())):
        monkeypatch.setenv("ADAPTFLEET_HOME", str(tmp_path / f"home-{number}"))
        found.append(tokenise(index, Encoder(tokenizer, 64, False), "t", execute))
    alone, together = found
    assert alone.files[0] != together.files[0]
    assert alone.files[0].read_bytes() == together.files[0].read_bytes()
    assert alone.files[0].with_name("tokens.json").read_text() == together.files[0].with_name("tokens.json").read_text()


def test_the_faults_are_those_of_one_process(
    local_cluster: Any, fresh_home: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPAN_ROWS", 50)
    bad = rows(0, 300)
    for i in (3, 120, 121, 299):
        bad[i] = {"prompt": f"long {i}", "completion": "x" * 90}
    index = open_dataset(DataSpec(train=str(write(tmp_path / "a.jsonl", bad))))
    messages = []
    for execute in (one_after_another, on_cluster()):
        with pytest.raises(DataError) as caught:
            tokenise(index, Encoder(tokenizer, 64, False), "t", execute)
        messages.append(str(caught.value))
    assert "4 rows of 300 are longer than 64 tokens" in messages[0] and messages[0] == messages[1]
    write(tmp_path / "a.jsonl", rows(0, 10))
    with pytest.raises(DataError, match="was changed while it was being read"):
        tokenise(index, Encoder(tokenizer, 500, False), "t", on_cluster())


def test_small_sets_need_no_cluster() -> None:
    def never() -> None:
        raise AssertionError("no cluster is needed")

    assert choose_execution("auto", LOCAL_ROWS, never) is one_after_another
    assert choose_execution("local", 10 * LOCAL_ROWS, never) is one_after_another
    assert choose_execution("auto", LOCAL_ROWS + 1, never) is not one_after_another
