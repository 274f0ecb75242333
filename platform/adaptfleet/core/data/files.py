"""Rows of `.jsonl`, `.parquet` and `.arrow` files, a span at a time, so that no file is ever held in memory.

A span is a run of rows that can be read without what stands before it: another pass, or another process, goes straight there.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.names import near
from adaptfleet.core.data.parsing import parse_line

SUFFIXES = (".jsonl", ".parquet")
SPAN_ROWS = 2048
"""Rows of a span, or more where the file is not divided so finely (a Parquet file's row groups)."""
_BATCH_ROWS = 1024

Numbered = tuple[int, Any]
"""A line's or row's number, from 1, and what stands there: a parsed value, or the BadRowError that says why there is none."""


@dataclass(frozen=True)
class Span:
    file: Path
    position: int
    """The first byte (JSONL), row group (Parquet) or record batch (Arrow)."""
    number: int
    """The line or row number there."""
    num_rows: int

    @property
    def unit(self) -> str:
        return "line" if self.file.suffix == ".jsonl" else "row"


def read_spans(file: Path) -> Iterator[tuple[Span, Iterable[Numbered]]]:
    """All spans of a file in order. The rows of one must be used before the next is asked for. DataError: the file cannot be read."""
    if file.suffix == ".jsonl":
        yield from _jsonl_spans(file)
        return
    with _opened(file) as groups:
        position, number = 0, 1
        while position < len(groups.sizes):
            end, num_rows = position, 0
            while end < len(groups.sizes) and (num_rows < SPAN_ROWS or not groups.sizes[end]):
                num_rows += groups.sizes[end]
                end += 1
            yield Span(file, position, number, num_rows), enumerate(groups.rows(range(position, end)), number)
            position, number = end, number + num_rows


def read_span(span: Span) -> Iterator[Numbered]:
    """The rows of one span. DataError: the file cannot be read, or is shorter than it was."""
    if span.file.suffix == ".jsonl":
        with _lines(span.file) as lines:
            lines.seek(span.position)
            found, _, _ = _take_lines(span.file, lines, span.number, span.num_rows)
            if len(found) < span.num_rows:
                raise _changed(span.file)
            yield from found
        return
    with _opened(span.file) as groups:
        end, num_rows = span.position, 0
        while num_rows < span.num_rows and end < len(groups.sizes):
            num_rows += groups.sizes[end]
            end += 1
        if num_rows != span.num_rows:
            raise _changed(span.file)
        yield from enumerate(groups.rows(range(span.position, end)), span.number)


def _changed(file: Path) -> DataError:
    return DataError(f"{file} was changed while it was being read. Run again once nothing writes to it.")


def check_file(file: Path) -> None:
    """DataError: another kind of file, or none; names what is there instead."""
    if file.suffix not in SUFFIXES:
        raise DataError(f"{file} is neither {' nor '.join(SUFFIXES)}; convert it to one of these.")
    if not file.exists():
        beside = sorted(p.name for p in file.parent.glob("*") if p.suffix in SUFFIXES) if file.parent.is_dir() else None
        if beside is None:
            raise DataError(f"no file {file.absolute()}: the folder {file.parent.absolute()} does not exist either.")
        there = f" The folder has {', '.join(beside[:10])}." if beside else " The folder has no .jsonl or .parquet file."
        raise DataError(f"no file {file.absolute()}.{near(file.name, beside)}{there}")
    if not file.is_file():
        raise DataError(f"{file} is a folder; name a {' or '.join(SUFFIXES)} file in it.")


@contextmanager
def _lines(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as lines:
            yield lines
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}.") from None


def _jsonl_spans(file: Path) -> Iterator[tuple[Span, list[Numbered]]]:
    with _lines(file) as lines:
        number, at_end = 1, False
        while not at_end:
            position, first = lines.tell(), number
            found, number, at_end = _take_lines(file, lines, number, SPAN_ROWS)
            if found:
                yield Span(file, position, first, len(found)), found


def _take_lines(file: Path, lines: BinaryIO, number: int, limit: int) -> tuple[list[Numbered], int, bool]:
    """Up to `limit` rows, the next line's number, and whether the file ended. Blank lines are passed over."""
    found: list[Numbered] = []
    while len(found) < limit:
        raw = lines.readline()
        if not raw:
            return found, number, True
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{file} is UTF-16 text; save it as UTF-8.")
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            found.append((number, parse_line(raw.rstrip(b"\r\n"))))
        number += 1
    return found, number, False


class _ParquetGroups:
    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self._has_columns = bool(file.schema_arrow.names)
        self.sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def rows(self, groups: range) -> Iterator[Any]:
        for batch in self._file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(groups)):
            # A file without columns has rows without content.
            yield from batch.to_pylist() if self._has_columns else [{}] * batch.num_rows


class _ArrowGroups:
    """Record batches, of a file (Feather) or a stream (what `save_to_disk` writes), mapped into memory."""

    def __init__(self, mapped: pa.MemoryMappedFile) -> None:
        try:
            reader = pa.ipc.open_file(mapped)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            mapped.seek(0)
            self._batches = list(pa.ipc.open_stream(mapped))
        self.sizes = [batch.num_rows for batch in self._batches]

    def rows(self, groups: range) -> Iterator[Any]:
        for i in groups:
            for start in range(0, self.sizes[i], _BATCH_ROWS):
                yield from self._batches[i].slice(start, _BATCH_ROWS).to_pylist()


@contextmanager
def _opened(file: Path) -> Iterator[_ParquetGroups | _ArrowGroups]:
    kind = "Parquet" if file.suffix == ".parquet" else "Arrow"
    try:
        if kind == "Parquet":
            with pq.ParquetFile(file) as parquet:
                yield _ParquetGroups(parquet)
        else:
            with pa.memory_map(str(file)) as mapped:
                yield _ArrowGroups(mapped)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no readable {kind} file: {str(error).splitlines()[0]}") from None
