"""Rows of a source as examples, streamed: every bad row is reported, with its line and the reason."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.files import Numbered, Span, check_file, read_spans
from adaptfleet.core.data.listing import Listing, rows
from adaptfleet.core.data.parsing import WAYS, BadRowError, Fault, parse_row
from adaptfleet.core.data.sources import Source


@dataclass
class BadRows:
    """What a pass over a source found unusable."""

    listing: Listing = field(default_factory=Listing)
    faults: dict[Fault, Listing] = field(default_factory=dict)
    """The same by kind."""

    def add(self, where: str, bad: BadRowError) -> None:
        self.listing.add(f"{where}: {bad}")
        self.faults.setdefault(bad.fault, Listing()).add(f"{where}: {bad}")

    def error(self, source: Source, num_good: int) -> DataError | None:
        """The fault of the whole source: bad rows, or none at all."""
        if self.listing.count:
            total = self.listing.count + num_good
            return DataError(self.listing.text(f"{source.name}: {rows(self.listing.count)} of {total} cannot be used."))
        return None if num_good else DataError(f"{source.name} has no rows; {WAYS}.")


def read_source(source: Source, bad: BadRows) -> Iterator[tuple[Span, Iterator[Example]]]:
    """The usable rows of each span in order; the others go to `bad`. A span's rows must be used before the next is asked for."""
    for file in source.files:
        for span, numbered in read_spans(file):
            yield span, examples(span, numbered, bad, with_file=len(source.files) > 1)


def examples(span: Span, numbered: Iterable[Numbered], bad: BadRows, with_file: bool = False) -> Iterator[Example]:
    for number, row in numbered:
        place = f"{span.unit} {number}"
        try:
            if isinstance(row, BadRowError):
                raise row
            yield parse_row(row, origin=f"{span.file.name}, {place}")
        except BadRowError as reason:
            bad.add(f"{span.file.name}, {place}" if with_file else place, reason)


def read_rows(path: str | Path) -> list[Example]:
    """The examples of a small `.jsonl` or `.parquet` file, in the file's order.

    DataError: no such file, another kind of file, no rows, or bad rows (all counted, the first 50 shown).
    """
    file = Path(path).expanduser()
    check_file(file)
    source, bad = Source(str(file), (file,)), BadRows()
    found = [example for _, span_rows in read_source(source, bad) for example in span_rows]
    error = bad.error(source, len(found))
    if error:
        raise error
    return found


def num_duplicates(examples: list[Example]) -> int:
    """How many examples equal an earlier one."""
    return len(examples) - len(set(examples))
