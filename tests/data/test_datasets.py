import json
from pathlib import Path

import pytest

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError, NotFoundError
from adaptfleet.core.data.datasets import load_dataset, split_rows
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.data.rows import read_rows


def write(file: Path, prompts: list[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": p, "completion": p.upper() + "!"}) + "\n" for p in prompts), encoding="utf-8")
    return file


def question(i: int, answer: str = "a") -> Example:
    return Example((Message("user", f"question {i}"), Message("assistant", answer)))


def prompts(rows: list[Example]) -> set[str]:
    return {row.messages[0].content for row in rows}


def test_a_file_is_split_so_that_equal_prompts_stand_on_one_side() -> None:
    rows = [question(i % 200, f"answer {i}") for i in range(1000)]
    train, test = split_rows(rows, 0.2, seed=3)
    assert len(train) + len(test) == 1000
    assert not prompts(train) & prompts(test)
    assert 20 <= len(prompts(test)) <= 60


def test_whitespace_and_case_do_not_carry_a_prompt_to_the_other_side() -> None:
    rows = [Example((Message("user", p), Message("assistant", "a"))) for i in range(100) for p in (f"Name {i}", f"name  {i} ")]
    train, test = split_rows(rows, 0.3, seed=0)
    assert not {r.prompt_key() for r in train} & {r.prompt_key() for r in test}
    assert len(train) % 2 == len(test) % 2 == 0


def test_rows_added_later_leave_the_others_on_their_side() -> None:
    before = split_rows([question(i) for i in range(300)], 0.1, seed=0)[1]
    after = split_rows([question(i) for i in range(500)], 0.1, seed=0)[1]
    assert prompts(before) == {p for p in prompts(after) if int(p.split()[1]) < 300}


def test_another_seed_holds_other_rows_out() -> None:
    rows = [question(i) for i in range(300)]
    assert prompts(split_rows(rows, 0.1, seed=0)[1]) != prompts(split_rows(rows, 0.1, seed=1)[1])


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_gets_a_row(fraction: float) -> None:
    train, test = split_rows([question(0), question(1)], fraction, seed=0)
    assert len(train) == len(test) == 1


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match="have one prompt among them, so none can be held out"):
        split_rows([question(0, "a"), question(0, "b")], 0.1, seed=0)


def test_max_rows_takes_the_first_of_the_seeded_order(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [f"p{i}" for i in range(100)])
    whole = load_dataset(DataSpec(train=str(file)))
    cut = load_dataset(DataSpec(train=str(file), max_rows=7))
    assert cut.train == whole.train[:7]
    assert cut.test == whole.test
    assert cut.sha256 != whole.sha256
    assert whole.train != [r for r in read_rows(file) if r in set(whole.train)]
    assert load_dataset(DataSpec(train=str(file), seed=1, max_rows=7)).train != cut.train


def test_the_hash_is_of_the_rows_and_not_of_the_file(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(50)]
    first = load_dataset(DataSpec(train=str(write(tmp_path / "a.jsonl", names))))
    spaced = tmp_path / "b.jsonl"
    spaced.write_text((tmp_path / "a.jsonl").read_text().replace('", "', '",     "') + "\n\n")
    assert load_dataset(DataSpec(train=str(spaced))).sha256 == first.sha256
    changed = tmp_path / "c.jsonl"
    changed.write_text((tmp_path / "a.jsonl").read_text().replace("P17!", "P17?"))
    assert load_dataset(DataSpec(train=str(changed))).sha256 != first.sha256


def test_duplicates_are_counted_and_kept(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ["a", "b", "a", "a"])
    dataset = load_dataset(DataSpec(train=str(train), test=str(write(tmp_path / "test.jsonl", ["c"]))))
    assert (len(dataset.train), dataset.num_duplicates) == (4, 2)


def test_a_test_file_that_shares_prompts_with_the_training_file_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [f"p{i}" for i in range(20)])
    test = write(tmp_path / "test.jsonl", ["new", *(f" P{i}" for i in range(8))])
    with pytest.raises(DataError) as caught:
        load_dataset(DataSpec(train=str(train), test=str(test)))
    message = str(caught.value)
    assert "8 of 9 held-out rows" in message
    assert "test.jsonl, line 2 = train.jsonl, line 1: ' P0'" in message
    assert message.endswith("... and 3 more")


def test_a_published_data_set_brings_its_own_held_out_rows_or_is_split(tmp_path: Path) -> None:
    write(tmp_path / "both" / "train.jsonl", ["a", "b"])
    write(tmp_path / "both" / "test.jsonl", ["c"])
    write(tmp_path / "one" / "train.jsonl", [f"p{i}" for i in range(40)])
    asked = []

    def fetch(reference: str) -> Path:
        asked.append(reference)
        return tmp_path / reference.partition("@")[0]

    assert prompts(load_dataset(DataSpec(train="both@3"), fetch).test) == {"c"}
    split = load_dataset(DataSpec(train="one"), fetch)
    assert len(split.train) + len(split.test) == 40
    assert split.test
    assert asked == ["both@3", "one"]
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match=r"has no file train\.jsonl"):
        load_dataset(DataSpec(train="model"), fetch)


def test_an_unknown_data_set_says_all_that_was_looked_for() -> None:
    def nothing(reference: str) -> Path:
        raise NotFoundError(f"no artifact {reference!r}.")

    with pytest.raises(DataError) as caught:
        load_dataset(DataSpec(train="adress-json"), nothing)
    message = str(caught.value)
    assert "neither embedded (address-json, name-json), nor a .jsonl or .parquet file, nor a published data set" in message
    assert "Did you mean 'address-json'" in message
    assert "no artifact 'adress-json'." in message
    with pytest.raises(DataError, match="no registry is open"):
        load_dataset(DataSpec(train="my-rows"))
    with pytest.raises(DataError, match="no safe name"):
        load_dataset(DataSpec(train="My Rows"))
