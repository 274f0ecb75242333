"""Finding a data set by what a contract calls it: embedded, published, a file, a folder, or a URL of one."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adaptfleet.contracts.data import EMBEDDED_DATASETS
from adaptfleet.contracts.errors import ContractError, DataError, NotFoundError
from adaptfleet.contracts.names import Reference, near
from adaptfleet.core.data.embedded import embedded_dataset
from adaptfleet.core.data.files import SUFFIXES, check_file
from adaptfleet.core.data.remote import is_url, local_copy

FetchPublished = Callable[[str], Path]
"""Gives the local folder of a published data set."""
_SIDES: dict[str, Literal["train", "test"]] = {"train": "train", "test": "test", "validation": "test"}
_SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")
"""What tells a folder that Hugging Face's `datasets` saved."""


@dataclass(frozen=True)
class Source:
    name: str
    """For messages: the file, folder or URL."""
    files: tuple[Path, ...]
    """Read in this order, as one."""


@dataclass(frozen=True)
class Sides:
    train: Source | None
    test: Source | None
    """The held-out part that the data set brings itself."""


def find_training(text: str, fetch_published: FetchPublished | None) -> Sides:
    """What `data.train` or a source of the mixture means. The train side is there. DataError names all that was looked for."""
    if text in EMBEDDED_DATASETS:
        return _folder_sides(embedded_dataset(text), text)
    if is_url(text) or text.endswith(SUFFIXES) or "/" in text or Path(text).exists():
        sides = _place_sides(text)
        if sides.train is None:
            raise DataError(f"{text} holds rows named as held-out ones alone ({_names(sides.test)}); name the training rows in data.train.")
        return sides
    sides = _folder_sides(_published(text, fetch_published), text)
    if sides.train is None:
        raise DataError(f"the published artifact {text!r} has no file train.jsonl, so it is no data set to train on.")
    return sides


def find_held_out(text: str) -> Source:
    """What `data.test` means: a folder's held-out side if it has one, else all of it."""
    sides = _place_sides(text)
    source = sides.test or sides.train
    assert source is not None
    return source


def _place_sides(text: str) -> Sides:
    place = local_copy(text) if is_url(text) else Path(text).expanduser()
    if not place.exists() and place.suffix == "":
        raise DataError(f"no file or folder {place.absolute()}.")
    if not place.is_dir() or place.suffix in SUFFIXES:
        check_file(place)
        return Sides(Source(str(place) if not is_url(text) else text, (place,)), None)
    sides = _folder_sides(place, text)
    if sides.train is None and sides.test is None:
        inside = sorted(p.name for p in place.iterdir() if not p.name.startswith("."))
        there = f" It has {', '.join(inside[:10])}{', ...' if len(inside) > 10 else ''}." if inside else " It is empty."
        raise DataError(f"the folder {text} has no {' or '.join(SUFFIXES)} file, nor was it saved by `save_to_disk`.{there}")
    return sides


def _folder_sides(folder: Path, name: str) -> Sides:
    """The files of a folder in name order. Those called `train`, `train-...`, `test...` or `validation...` stand on their side; where
    none is called so, all are training rows."""
    if any((folder / mark).is_file() for mark in _SAVED):
        return _saved_sides(folder, name)
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".") and p.is_file())
    sides = {file: _SIDES.get(file.name.replace(".", "-").replace("_", "-").partition("-")[0]) for file in files}
    named = {side for side in sides.values() if side}
    nameless = [file.name for file, side in sides.items() if not side]
    if named and nameless:
        raise DataError(
            f"the folder {name} has files whose names say a side (train, test, validation) and others: {', '.join(nameless[:10])}. "
            f"Name all of them so, or none."
        )
    if not named:
        return Sides(_source(name, files), None)
    train, test = ([file for file in files if sides[file] == side] for side in ("train", "test"))
    return Sides(_source(name, train), _source(name, test, held_out=True))


def _source(name: str, files: list[Path], held_out: bool = False) -> Source | None:
    if not files:
        return None
    if len(files) == 1 and not is_url(name):
        return Source(str(files[0]), tuple(files))
    return Source(f"{name} (held-out files)" if held_out else name, tuple(files))


def _saved_sides(folder: Path, name: str) -> Sides:
    """A data set by `Dataset.save_to_disk`, or several with their split names by `DatasetDict.save_to_disk`."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        unknown = sorted(set(splits) - set(_SIDES))
        if unknown or not splits:
            raise DataError(f"{folder} has the splits {', '.join(map(repr, splits))}; allowed are {', '.join(_SIDES)}. Name one's folder.")
        files = {side: [f for split in splits if _SIDES[split] == side for f in _shards(folder / split)] for side in ("train", "test")}
        return Sides(_source(name, files["train"]), _source(name, files["test"], held_out=True))
    return Sides(_source(name, _shards(folder)), None)


def _shards(folder: Path) -> list[Path]:
    """The Arrow files in the order that the state says, else by name."""
    state = folder / "state.json"
    if state.is_file():
        names = [str(entry["filename"]) for entry in _json(state).get("_data_files", [])]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise DataError(f"{state} names files outside of its folder: {', '.join(outside[:5])}. Save the data set again.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.arrow"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{folder} was saved by `datasets`, but lacks {', '.join(missing) or 'any .arrow file'}. Save it again.")
    return files


def _json(file: Path) -> dict[str, list]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    return value if isinstance(value, dict) else {}


def _names(source: Source | None) -> str:
    return ", ".join(file.name for file in source.files[:10]) if source else ""


def _published(text: str, fetch_published: FetchPublished | None) -> Path:
    looked_for = (
        f"the data set {text!r} is neither embedded ({', '.join(EMBEDDED_DATASETS)}), nor a {' or '.join(SUFFIXES)} file, "
        f"nor a published data set.{near(text, EMBEDDED_DATASETS)}"
    )
    try:
        Reference.parse(text)
    except ContractError as error:
        raise DataError(f"{looked_for} {error}") from None
    if fetch_published is None:
        raise DataError(f"{looked_for} Published data sets were not looked for: no registry is open here.")
    try:
        return fetch_published(text)
    except NotFoundError as error:
        raise DataError(f"{looked_for} {error}") from None
