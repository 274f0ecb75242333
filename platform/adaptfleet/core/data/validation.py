"""What a data set is like, before anything is trained on it: its sizes, and all that is wrong or doubtful in it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.datasets import DatasetIndex, RowNumbers, survey_dataset
from adaptfleet.core.data.disk_arrays import joined
from adaptfleet.core.data.encoding import EncodedBlock, Faults, encode_block
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.files import SPAN_ROWS
from adaptfleet.core.data.listing import MAX_SHOWN, Listing, rows
from adaptfleet.core.data.parsing import Fault
from adaptfleet.core.data.rows import BadRows
from adaptfleet.core.data.sources import FetchPublished
from adaptfleet.core.data.token_cache import Encoder

MIN_ANSWER_CHARS = 2
"""An answer of fewer characters is doubtful, not wrong: a digit may be all that is asked for."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_FAULTS: dict[Fault, str] = {
    "json": "lines that are no JSON",
    "roles": "rows with roles mixed up",
    "empty": "rows with an empty message",
    "tools": "rows with tool calls",
    "form": "rows of no known form",
}


@dataclass(frozen=True)
class Finding:
    fact: str
    is_fatal: bool
    """Nothing can be trained as long as it stands."""
    count: int
    """0: the fact says it already."""
    shown: tuple[str, ...] = ()
    """The first of them, with file and line."""

    @property
    def title(self) -> str:
        return f"{self.count:,} {self.fact}" if self.count else self.fact

    @property
    def lines(self) -> list[str]:
        rest = self.count - len(self.shown)
        return [*self.shown, *([f"... and {rest:,} more"] if self.shown and rest > 0 else [])]


@dataclass(frozen=True)
class Bar:
    first: int
    last: int
    count: int


@dataclass
class SideStatistics:
    """Rows that can be tokenised, the too long ones among them."""

    name: str
    length_blocks: list[npt.NDArray[np.int32]] = field(default_factory=list)
    label_blocks: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(self, block: EncodedBlock) -> None:
        self.length_blocks.append(np.asarray(block.lengths, dtype=np.int32))
        self.label_blocks.append(np.asarray([row.num_labels for row in block.rows], dtype=np.int32))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row, before any is cut."""
        return np.concatenate([np.empty(0, dtype=np.int32), *self.length_blocks])

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Tokens that count in the loss, of each row that can be trained on."""
        return np.concatenate([np.empty(0, dtype=np.int32), *self.label_blocks])

    def histogram(self, num_bars: int = 20) -> list[Bar]:
        """Rows by their number of tokens, in ranges of whole numbers."""
        lengths_N = self.lengths
        if not len(lengths_N):
            return []
        low, high = int(lengths_N.min()), int(lengths_N.max())
        width = -(-(high - low + 1) // num_bars)
        counts = np.bincount((lengths_N - low) // width)
        return [Bar(low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class Validation:
    sides: tuple[SideStatistics, ...]
    findings: tuple[Finding, ...]
    max_tokens: int
    sources: tuple[str, ...]

    @property
    def is_trainable(self) -> bool:
        return not any(finding.is_fatal for finding in self.findings)


def statistics(validation: Validation) -> list[tuple[str, ...]]:
    """Rows of a table: what is measured, and its value on each side."""
    lengths = [side.lengths for side in validation.sides]
    labels = [side.labels for side in validation.sides]
    table = [
        ("rows", *(f"{len(n):,}" for n in lengths)),
        ("tokens", *(f"{int(n.sum(dtype=np.int64)):,}" for n in lengths)),
        ("tokens that count in the loss", *(f"{int(n.sum(dtype=np.int64)):,}" for n in labels)),
        ("tokens of a row, mean", *(f"{n.mean():.1f}" if len(n) else "" for n in lengths)),
    ]
    names = {0: "least", 50: "median", 100: "most"}
    for percent in PERCENTILES:
        values = (f"{np.percentile(n, percent, method='inverted_cdf'):,}" if len(n) else "" for n in lengths)
        table.append((f"tokens of a row, {names.get(percent, f'{percent}%')}", *values))
    return table


def validate(spec: DataSpec, encoder: Encoder, fetch_published: FetchPublished | None = None) -> Validation:
    """Reads all rows and tokenises them; nothing is kept but counts and the first offenders of each kind.

    DataError: a source cannot be found or read at all.
    """
    bad_rows: dict[str, BadRows] = {}
    index, errors = survey_dataset(spec, fetch_published, bad_rows)
    sides = (SideStatistics("train"), SideStatistics("held out"))
    faults, cut, short = Faults(), Listing(), Listing()
    for examples, side in _blocks(index):
        block = encode_block(examples, encoder.tokenizer, encoder.max_tokens, encoder.truncate)
        sides[side].add(block)
        faults.merge(block.faults)
        if encoder.truncate:
            cut.extend(f"{n}: {k} tokens" for n, k in zip(block.names, block.lengths, strict=True) if k > encoder.max_tokens)
        short.extend(f"{e.origin}: {e.answer!r}" for e in examples if e.answer and len(e.answer.strip()) < MIN_ANSWER_CHARS)
    findings = [*_unusable(bad_rows), *_untrainable(faults, encoder.max_tokens), *_other(errors, bad_rows)]
    findings += _doubts(index, cut, short, encoder.max_tokens)
    return Validation(sides, tuple(findings), encoder.max_tokens, tuple(scan.source.name for scan in index.scans))


def _blocks(index: DatasetIndex) -> Iterator[tuple[list[Example], int]]:
    """The used rows in blocks of one side: 0 the training rows, 1 those held out."""
    side_N = np.full(int(index.starts[-1]), -1, dtype=np.int8)
    side_N[index.test] = 1
    side_N[index.train] = 0
    for scan, start in zip(index.scans, index.starts.tolist(), strict=False):
        for at in range(len(scan.spans)):
            numbered = enumerate(scan.span_examples(at), start + int(scan.span_starts[at]))
            while block := list(islice(numbered, SPAN_ROWS)):
                for side in (0, 1):
                    examples = [example for number, example in block if side_N[number] == side]
                    if examples:
                        yield examples, side


def _unusable(bad_rows: dict[str, BadRows]) -> Iterator[Finding]:
    for source, bad in bad_rows.items():
        for fault, what in _FAULTS.items():
            listing = bad.faults.get(fault)
            if listing:
                yield Finding(f"{what} in {source}", True, listing.count, tuple(listing.shown))


def _untrainable(faults: Faults, max_tokens: int) -> Iterator[Finding]:
    for fact, listing in (
        ("rows of `messages`, for which the tokenizer has no chat template", faults.untemplated),
        ("rows that hold the template's control tokens", faults.controls),
        ("rows that the chat template refuses", faults.unusable),
        ("rows whose answers melt into the prompt's tokens", faults.melted),
        (f"rows longer than {max_tokens} tokens (the longest: {faults.longest}; train.truncate cuts them)", faults.too_long),
        (f"rows without an answer within {max_tokens} tokens", faults.unlabelled),
    ):
        if listing.count:
            yield Finding(fact, True, listing.count, tuple(listing.shown))


def _other(errors: list[DataError], bad_rows: dict[str, BadRows]) -> Iterator[Finding]:
    """Leaks between the sides, sources without rows; bad rows are told by kind already."""
    for error in errors:
        first, *lines = str(error).splitlines()
        if not any(first.startswith(f"{source}: ") for source in bad_rows):
            yield Finding(first, True, 0, tuple(line.strip() for line in lines))


def _doubts(index: DatasetIndex, cut: Listing, short: Listing, max_tokens: int) -> Iterator[Finding]:
    for side, numbers in (("training", np.sort(index.train)), ("held-out", index.test)):
        count, shown = _duplicates(index, numbers)
        if count:
            yield Finding(f"{side} rows that equal an earlier one (a row given twice counts twice)", False, count, shown)
    if cut.count:
        yield Finding(f"rows that will be cut at {max_tokens} tokens", False, cut.count, tuple(cut.shown))
    if short.count:
        yield Finding(f"rows whose answer has fewer than {MIN_ANSWER_CHARS} characters", False, short.count, tuple(short.shown))
    if not len(index.test):
        yield Finding(f"nothing is held out of {rows(len(index.train))}: give data.test or raise data.test_fraction", True, 0)


def _duplicates(index: DatasetIndex, numbers: RowNumbers) -> tuple[int, tuple[str, ...]]:
    digests_N = joined([scan.digests_N2 for scan in index.scans])[numbers, 0]
    _, first, inverse = np.unique(digests_N, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(numbers)))
    some = again[:MAX_SHOWN]
    pairs = zip(index.examples_at(numbers[some]), index.examples_at(numbers[first[inverse[some]]]), strict=True)
    return len(again), tuple(f"{row.origin} = {earlier.origin}" for row, earlier in pairs)
