"""Finding a data set (embedded, published or a file), and holding rows out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adaptfleet.contracts.data import EMBEDDED_DATASETS, DataSpec
from adaptfleet.contracts.errors import ContractError, DataError, NotFoundError
from adaptfleet.contracts.names import Reference, near
from adaptfleet.core.data.embedded import embedded_dataset
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.rows import SUFFIXES, num_duplicates, read_rows
from adaptfleet.core.data.sample_order import epoch_order

_NUM_SHARED_SHOWN = 5


@dataclass(frozen=True)
class Dataset:
    train: list[Example]
    """In the seeded order, cut to `max_rows`."""
    test: list[Example]
    """In the file's order."""
    sha256: str
    """Of the rows of both, in order: the same rows from another file or format have the same hash."""
    num_duplicates: int = 0
    """Training rows that equal an earlier one. They are kept: a row given twice counts twice."""


def load_dataset(spec: DataSpec, fetch_published: Callable[[str], Path] | None = None) -> Dataset:
    """The rows that a spec asks for.

    `fetch_published` gives the local folder of a published data set, which holds `train.jsonl` and perhaps `test.jsonl`.
    DataError: nothing of that name, unusable rows, or held-out prompts that stand among the training rows too.
    """
    train, test = _sides(spec, fetch_published)
    order = epoch_order(len(train), spec.seed, epoch=0)[: spec.max_rows]
    train = [train[i] for i in order]
    return Dataset(train, test, _sha256(train, test), num_duplicates(train))


def _sides(spec: DataSpec, fetch_published: Callable[[str], Path] | None) -> tuple[list[Example], list[Example]]:
    if spec.train in EMBEDDED_DATASETS:
        folder = embedded_dataset(spec.train)
        return read_rows(folder / "train.jsonl"), read_rows(folder / "test.jsonl")
    if spec.train.endswith(SUFFIXES) or "/" in spec.train or Path(spec.train).exists():
        train_file, test_file = Path(spec.train), None
    else:
        train_file, test_file = _published(spec.train, fetch_published)
    if spec.test is not None:
        test_file = Path(spec.test)
    train = read_rows(train_file)
    if test_file is None:
        return split_rows(train, spec.test_fraction, spec.seed)
    test = read_rows(test_file)
    _check_no_leak(train, test, train_file, test_file)
    return train, test


def _published(text: str, fetch_published: Callable[[str], Path] | None) -> tuple[Path, Path | None]:
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
        folder = fetch_published(text)
    except NotFoundError as error:
        raise DataError(f"{looked_for} {error}") from None
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not train.is_file():
        raise DataError(f"the published artifact {text!r} has no file train.jsonl, so it is no data set to train on.")
    return train, test if test.is_file() else None


def split_rows(rows: list[Example], test_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Train and test rows. A row's side depends on its prompt and the seed alone, so that equal prompts stand together and rows that are
    added later leave the others where they are. Each side gets at least one prompt.
    """
    places = {key: _place(key, seed) for key in {row.prompt_key() for row in rows}}
    if len(places) < 2:
        raise DataError(f"the {len(rows)} rows have one prompt among them, so none can be held out. Add rows, or name a file in `test`.")
    held_out = {key for key, place in places.items() if place < test_fraction}
    if not held_out:
        held_out = {min(places, key=places.__getitem__)}
    if len(held_out) == len(places):
        held_out.remove(max(places, key=places.__getitem__))
    return [r for r in rows if r.prompt_key() not in held_out], [r for r in rows if r.prompt_key() in held_out]


def _place(key: str, seed: int) -> float:
    """A place in [0, 1), even over keys."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def _check_no_leak(train: list[Example], test: list[Example], train_file: Path, test_file: Path) -> None:
    first_in_train: dict[str, Example] = {}
    for row in train:
        first_in_train.setdefault(row.prompt_key(), row)
    shared = [(row, first_in_train[row.prompt_key()]) for row in test if row.prompt_key() in first_in_train]
    if not shared:
        return
    shown = [f"  {t.origin} = {s.origin}: {_shortened(t)}" for t, s in shared[:_NUM_SHARED_SHOWN]]
    rest = [f"  ... and {len(shared) - len(shown)} more"] if len(shared) > len(shown) else []
    count = f"{len(shared)} of {len(test)} held-out rows in {test_file} have prompts that stand in {train_file} too"
    raise DataError("\n".join([f"{count}: results on them would be memory. Remove them from one of the two.", *shown, *rest]))


def _shortened(row: Example) -> str:
    text = row.text if row.text is not None else row.prompt[-1].content
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _sha256(train: list[Example], test: list[Example]) -> str:
    digest = hashlib.sha256()
    for side, rows in (("train", train), ("test", test)):
        for row in rows:
            digest.update(json.dumps([side, row.as_row()], ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
