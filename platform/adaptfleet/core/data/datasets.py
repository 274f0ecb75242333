"""Finding a data set, mixing several, and holding rows out, without keeping the rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.disk_arrays import joined
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.rows import BadRows
from adaptfleet.core.data.sample_order import permutation
from adaptfleet.core.data.scan import Scan, num_repeated, prompt_place, rows_sha256, scan
from adaptfleet.core.data.sources import FetchPublished, Sides, Source, find_held_out, find_training

_NUM_SHARED_SHOWN = 5
_SOUGHT_TOGETHER = 65_536

RowNumbers = npt.NDArray[np.int32]
"""Up to two thousand million rows. Four bytes a row are what a data set holds in memory, a few times."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory."""

    train: list[Example]
    """In the seeded order, cut to `max_rows`; of a mixture, source after source."""
    test: list[Example]
    """In the files' order."""
    sha256: str
    """Of the rows of both, in order: the same rows from another file or format have the same hash."""
    num_duplicates: int = 0
    """Training rows that equal an earlier one. They are kept: a row given twice counts twice."""


@dataclass(frozen=True)
class DatasetIndex:
    """A data set on disk: which rows of which files stand on which side. Rows are numbered through all scans, one after another."""

    scans: tuple[Scan, ...]
    train_parts: tuple[RowNumbers, ...]
    """The training rows of each source of the mixture, in the seeded order, cut to `max_rows`."""
    test: RowNumbers
    """In the files' order."""
    weights: tuple[float, ...]
    """Of the training parts."""

    @property
    def train(self) -> RowNumbers:
        return self.train_parts[0] if len(self.train_parts) == 1 else np.concatenate(self.train_parts)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """The number of each scan's first row, and of all rows at the end."""
        return np.cumsum([0, *map(len, self.scans)])

    @property
    def sha256(self) -> str:
        digests_N2 = joined([s.digests_N2 for s in self.scans])
        sides = [rows_sha256(digests_N2, numbers) for numbers in (self.train, self.test)]
        return hashlib.sha256(b"".join(sides)).hexdigest()

    @property
    def num_duplicates(self) -> int:
        return num_repeated(joined([s.digests_N2 for s in self.scans]), self.train)

    def examples_at(self, numbers: RowNumbers) -> list[Example]:
        """A few rows, in the given order."""
        starts = self.starts
        owners = np.searchsorted(starts, numbers, side="right") - 1
        found: dict[int, Example] = {}
        for owner in np.unique(owners).tolist():
            mine = numbers[owners == owner]
            found.update(zip(mine.tolist(), self.scans[owner].examples_at(mine - starts[owner]), strict=True))
        return [found[number] for number in numbers.tolist()]

    def load(self) -> Dataset:
        """All of it in memory: for sets that are known to be small."""
        return Dataset(self.examples_at(self.train), self.examples_at(self.test), self.sha256, self.num_duplicates)


def load_dataset(spec: DataSpec, fetch_published: FetchPublished | None = None) -> Dataset:
    """The rows that a spec asks for, in memory; see `open_dataset`."""
    return open_dataset(spec, fetch_published).load()


def open_dataset(spec: DataSpec, fetch_published: FetchPublished | None = None) -> DatasetIndex:
    """Which rows a spec asks for. Each source is read through once.

    `fetch_published` gives the local folder of a published data set, which holds `train.jsonl` and perhaps `test.jsonl`.
    DataError: nothing of that name, unusable rows, or held-out prompts that stand among the training rows too; the faults of all sources.
    """
    index, faults = survey_dataset(spec, fetch_published)
    if faults:
        raise DataError("\n".join(map(str, faults)))
    return index


def survey_dataset(
    spec: DataSpec, fetch_published: FetchPublished | None = None, found_bad: dict[str, BadRows] | None = None
) -> tuple[DatasetIndex, list[DataError]]:
    """The index of the usable rows, and why the set cannot be trained on as it is. `found_bad` receives the unusable rows by source name.

    DataError: a source cannot be found or read at all.
    """
    sides, held_out = _found(spec, fetch_published)
    sources = [side.train for side in sides if side.train] + held_out
    scans, faults = [], []
    for source in sources:
        bad = BadRows()
        scans.append(scan(source, spec.seed, bad))
        if found_bad is not None:
            found_bad[source.name] = bad
        error = bad.error(source, len(scans[-1]))
        if error:
            faults.append(error)
    if faults and found_bad is None:
        return DatasetIndex(tuple(scans), (), np.empty(0, dtype=np.int32), ()), faults
    starts = np.cumsum([0, *map(len, scans)])
    parts = [np.arange(starts[i], starts[i + 1], dtype=np.int32) for i in range(len(sides))]
    given = np.arange(starts[len(sides)], starts[-1], dtype=np.int32)
    prompts = joined([s.prompts_N for s in scans])
    divided = [] if spec.test is not None else [i for i, side in enumerate(sides) if side.test is None]
    test = [given]
    if divided:
        try:
            last = last_held_out([scans[i].prompts_N for i in divided], spec.test_fraction)
            for i in divided:
                chosen = scans[i].prompts_N <= last
                test.append(parts[i][chosen])
                parts[i] = parts[i][~chosen]
        except DataError as error:
            faults.append(error)
    seeded = tuple(part[permutation(len(part), spec.seed, epoch=0)[: spec.max_rows]] for part in parts)
    weights = tuple(entry.weight for entry in spec.sources())
    index = DatasetIndex(tuple(scans), seeded, np.sort(np.concatenate(test)), weights)
    empty = [entry.source for entry, part in zip(spec.sources(), seeded, strict=True) if not len(part)]
    if empty and not faults:
        faults.append(DataError(f"no row of {', '.join(empty)} is left to train on: all were held out. Lower data.test_fraction."))
    leak = _leak(index, np.concatenate(parts), prompts) if len(given) else None
    return index, [*faults, leak] if leak else faults


def _found(spec: DataSpec, fetch_published: FetchPublished | None) -> tuple[list[Sides], list[Source]]:
    """The sources' sides, and the held-out sources; what cannot be found is reported together."""
    sides: list[Sides] = []
    missing: list[str] = []
    held_out: list[Source] = []
    for entry in spec.sources():
        try:
            sides.append(find_training(entry.source, fetch_published))
        except DataError as error:
            missing.append(str(error))
    try:
        held_out = [find_held_out(spec.test)] if spec.test is not None else [side.test for side in sides if side.test]
    except DataError as error:
        missing.append(str(error))
    if missing:
        raise DataError("\n".join(missing))
    return sides, held_out


def split_rows(rows: list[Example], test_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Train and test rows of a set in memory; see `last_held_out`."""
    prompts_N = np.frombuffer(b"".join(prompt_place(row, seed) for row in rows), dtype="<u8")
    is_held_out = (prompts_N <= last_held_out([prompts_N], test_fraction)).tolist()
    return [r for r, held in zip(rows, is_held_out, strict=True) if not held], [
        r for r, held in zip(rows, is_held_out, strict=True) if held
    ]


def last_held_out(prompts: Sequence[npt.NDArray[np.uint64]], test_fraction: float) -> np.uint64:
    """The last place on the test side: prompts up to it go there. A prompt's side depends on itself and the seed alone, so that equal
    prompts stand together and rows that are added later leave the others where they are. Each side gets at least one prompt.
    """
    prompts = [places_N for places_N in prompts if len(places_N)]
    lowest = min((places_N.min() for places_N in prompts), default=np.uint64(0))
    highest = max((places_N.max() for places_N in prompts), default=np.uint64(0))
    if lowest == highest:
        raise DataError(
            f"the {sum(map(len, prompts))} rows have one prompt among them, so none can be held out. Add rows, or name a file in `test`."
        )
    last = lowest
    for places_N in prompts:
        for begin in range(0, len(places_N), _SOUGHT_TOGETHER):
            some = places_N[begin : begin + _SOUGHT_TOGETHER]
            held_out = some[(some / 2.0**64 < test_fraction) & (some < highest)]
            last = max(last, held_out.max(initial=lowest))
    return last


def _leak(index: DatasetIndex, train: RowNumbers, prompts: npt.NDArray[np.uint64]) -> DataError | None:
    places = np.unique(prompts[index.test])
    first = np.full(len(places), -1, dtype=np.int32)
    for begin in range(0, len(train), _SOUGHT_TOGETHER):
        some = train[begin : begin + _SOUGHT_TOGETHER]
        at = np.searchsorted(places, prompts[some]).clip(max=len(places) - 1)
        hits = np.flatnonzero(places[at] == prompts[some])[::-1]
        new = hits[first[at[hits]] < 0]
        first[at[new]] = some[new]
    found = first[np.searchsorted(places, prompts[index.test])]
    shared = index.test[found >= 0]
    if not len(shared):
        return None
    some = shared[:_NUM_SHARED_SHOWN]
    twins = found[found >= 0][:_NUM_SHARED_SHOWN]
    pairs = zip(index.examples_at(some), index.examples_at(twins), strict=True)
    shown = [f"  {t.origin} = {s.origin}: {_shortened(t)}" for t, s in pairs]
    rest = [f"  ... and {len(shared) - len(shown)} more"] if len(shared) > len(shown) else []
    files = [", ".join(dict.fromkeys(index.scans[i].source.name for i in _owners(index, rows))) for rows in (index.test, train)]
    count = f"{len(shared)} of {len(index.test)} held-out rows in {files[0]} have prompts that stand in {files[1]} too"
    return DataError("\n".join([f"{count}: results on them would be memory. Remove them from one of the two.", *shown, *rest]))


def _owners(index: DatasetIndex, numbers: RowNumbers) -> list[int]:
    return np.unique(np.searchsorted(index.starts, numbers, side="right") - 1).tolist()


def _shortened(row: Example) -> str:
    text = row.text if row.text is not None else row.prompt[-1].content
    return repr(text if len(text) <= 60 else text[:57] + "...")
