"""The first pass over a source: what must be known of every row, in 25 bytes each on disk, so that the rows need not be kept."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptfleet.core.data.disk_arrays import DiskArray
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.files import Span, read_span
from adaptfleet.core.data.rows import BadRows, examples, read_source
from adaptfleet.core.data.sources import Source

TEXT, PLAIN, CHAT, PAIR = range(4)
_HASHED_TOGETHER = 65_536


@dataclass(frozen=True)
class Scan:
    """A source's usable rows, numbered from 0 in their order."""

    source: Source
    spans: tuple[Span, ...]
    span_starts: npt.NDArray[np.int64]
    """The first row of each span, and the number of all rows at the end."""
    digests_N2: npt.NDArray[np.uint64]
    """128 bits of each row's SHA-256: equal rows have equal digests, whatever file or format they came from."""
    prompts_N: npt.NDArray[np.uint64]
    """64 bits of the SHA-256 of the seed and each row's prompt, which are also its place among the rows that may be held out."""
    forms_N: npt.NDArray[np.uint8]
    """TEXT, PLAIN, CHAT or PAIR (a preference)."""

    def __len__(self) -> int:
        return len(self.forms_N)

    def examples_at(self, rows: npt.NDArray[np.integer]) -> list[Example]:
        """A few rows, in the given order; reads the spans that hold them."""
        found: dict[int, Example] = {}
        wanted = set(rows.tolist())
        for at in np.unique(np.searchsorted(self.span_starts, rows, side="right") - 1).tolist():
            for row, example in enumerate(self.span_examples(at), int(self.span_starts[at])):
                if row in wanted:
                    found[row] = example
        return [found[row] for row in rows.tolist()]

    def span_examples(self, at: int) -> Iterator[Example]:
        """The usable rows of a span, read once more."""
        span = self.spans[at]
        return examples(span, read_span(span), BadRows(), with_file=len(self.source.files) > 1)


def scan(source: Source, seed: int, bad: BadRows) -> Scan:
    """Reads a source through. Rows that cannot be used are added to `bad` and left out. DataError: a file cannot be read."""
    spans: list[Span] = []
    starts = [0]
    all_digests, all_prompts, all_forms = DiskArray("<u8"), DiskArray("<u8"), DiskArray(np.uint8)
    for span, span_rows in read_source(source, bad):
        digests, prompts, forms = bytearray(), bytearray(), bytearray()
        for example in span_rows:
            digests += row_sha256(example)[:16]
            prompts += prompt_place(example, seed)
            forms.append(_form(example))
        all_digests.append(digests)
        all_prompts.append(prompts)
        all_forms.append(forms)
        spans.append(span)
        starts.append(starts[-1] + len(forms))
    return Scan(
        source,
        tuple(spans),
        np.asarray(starts, dtype=np.int64),
        all_digests.mapped().reshape(-1, 2),
        all_prompts.mapped(),
        all_forms.mapped(),
    )


def _form(example: Example) -> int:
    if example.rejected is not None:
        return PAIR
    return TEXT if example.text is not None else PLAIN if example.plain else CHAT


def row_sha256(example: Example) -> bytes:
    return hashlib.sha256(json.dumps(example.as_row(), ensure_ascii=False, sort_keys=True).encode()).digest()


def rows_sha256(digests_N2: npt.NDArray[np.uint64], numbers: npt.NDArray[np.integer]) -> bytes:
    """The SHA-256 of some rows in their order, by their digests; a few rows are copied at a time."""
    digest = hashlib.sha256()
    for begin in range(0, len(numbers), _HASHED_TOGETHER):
        digest.update(digests_N2[numbers[begin : begin + _HASHED_TOGETHER]].tobytes())
    return digest.digest()


def chosen_sha256(digests_N2: npt.NDArray[np.uint64], chosen_N: npt.NDArray[np.bool_]) -> bytes:
    """The same of all rows that are chosen."""
    digest = hashlib.sha256()
    for begin in range(0, len(chosen_N), _HASHED_TOGETHER):
        part = slice(begin, begin + _HASHED_TOGETHER)
        digest.update(digests_N2[part][chosen_N[part]].tobytes())
    return digest.digest()


def num_repeated(digests_N2: npt.NDArray[np.uint64], numbers: npt.NDArray[np.integer]) -> int:
    """How many of some rows equal an earlier one. Counted a sixteenth of the digests at a time where there are many."""
    # 64 bits tell a hundred million rows apart with a chance of one in three thousand to miscount by one.
    buckets = 1 if len(numbers) <= _HASHED_TOGETHER else 16
    num_distinct = 0
    for bucket in range(buckets):
        found = [np.empty(0, dtype=np.uint64)]
        for begin in range(0, len(numbers), _HASHED_TOGETHER):
            digests = digests_N2[numbers[begin : begin + _HASHED_TOGETHER], 0]
            found.append(digests[digests % np.uint64(buckets) == bucket])
        num_distinct += len(np.unique(np.concatenate(found)))
    return len(numbers) - num_distinct


def prompt_place(example: Example, seed: int) -> bytes:
    """A place in [0, 2^64), even over prompts, as a little-endian number."""
    return hashlib.sha256(f"{seed}:{example.prompt_key()}".encode()).digest()[7::-1]
