"""Token ids and label masks in Arrow files that are mapped into memory: training reads a row where it lies and keeps none."""

import hashlib
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from adaptfleet.core.data.encoding import Encoded

_RELEASED_AFTER = 256
"""Places read in a file before its mapped pages are given back. The system keeps them in its cache; but they would count as this process's
memory, 64 KB for each row read at random, until the whole file did."""
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "label_mask": pa.list_(pa.bool_()), "split": pa.int32()})


@dataclass(frozen=True)
class TokenRow:
    """One example as it lies in the file; see `Encoded`."""

    input_ids: npt.NDArray[np.int32]
    label_mask: npt.NDArray[np.bool_]
    split: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return int(np.count_nonzero(self.label_mask))


def record_batch(encoded: Sequence[Encoded]) -> pa.RecordBatch:
    columns = [[row.input_ids for row in encoded], [row.label_mask for row in encoded], [row.split for row in encoded]]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def write_tokens(file: Path, batches: Iterable[pa.RecordBatch]) -> tuple[int, int]:
    """Writes an uncompressed Arrow file, to the disk itself; returns the numbers of rows and of tokens."""
    num_rows = num_tokens = 0
    with file.open("wb") as out:
        with pa.ipc.new_file(out, SCHEMA) as writer:
            for batch in batches:
                if batch.num_rows:
                    writer.write_batch(batch)
                num_rows += batch.num_rows
                num_tokens += len(batch.column(0).values)
        out.flush()
        os.fsync(out.fileno())
    return num_rows, num_tokens


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class _Batch:
    """The buffers of a record batch, as arrays over the mapped file."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        ids, masks, splits = batch.columns
        self.starts = np.frombuffer(ids.buffers()[1], dtype=np.int32, count=batch.num_rows + 1)
        self._ids = np.frombuffer(ids.buffers()[3], dtype=np.int32)
        self._bits = np.frombuffer(masks.buffers()[3], dtype=np.uint8)
        self._splits = np.frombuffer(splits.buffers()[1], dtype=np.int32, count=batch.num_rows)

    def row(self, at: int) -> TokenRow:
        start, end = int(self.starts[at]), int(self.starts[at + 1])
        bits = np.unpackbits(self._bits[start // 8 : (end + 7) // 8], bitorder="little")
        mask = bits[start % 8 : start % 8 + end - start].view(np.bool_)
        return TokenRow(self._ids[start:end], mask, int(self._splits[at]))


class TokenFile:
    """A mapped file of tokens. Rows are views: the file stays mapped as long as one is held."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as opened:
            self._mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(self._mapped))
        self._batches = [_Batch(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._first = np.cumsum([0, *(len(batch.starts) - 1 for batch in self._batches)])
        self._num_read = 0
        self._release()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, at: int) -> TokenRow:
        self._num_read += 1
        if self._num_read % _RELEASED_AFTER == 0:
            self._release()
        batch = int(np.searchsorted(self._first, at, side="right")) - 1
        return self._batches[batch].row(at - int(self._first[batch]))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        lengths_N = np.empty(len(self), dtype=np.int32)
        for number, (batch, first) in enumerate(zip(self._batches, self._first, strict=False)):
            lengths_N[first : first + len(batch.starts) - 1] = np.diff(batch.starts)
            if number % _RELEASED_AFTER == 0:
                self._release()
        self._release()
        return lengths_N

    def _release(self) -> None:
        self._mapped.madvise(mmap.MADV_DONTNEED)


class Rows(Sequence[TokenRow]):
    """Rows of several token files in an order of their own: `order_N` numbers the files' rows one file after another."""

    def __init__(self, files: Sequence[TokenFile], order_N: npt.NDArray[np.integer]) -> None:
        self.files = tuple(files)
        self.order_N = order_N
        self._first = np.cumsum([0, *map(len, self.files)])

    def __len__(self) -> int:
        return len(self.order_N)

    @overload
    def __getitem__(self, at: int) -> TokenRow: ...
    @overload
    def __getitem__(self, at: slice) -> "Rows": ...
    def __getitem__(self, at: int | slice) -> "TokenRow | Rows":
        if isinstance(at, slice):
            return Rows(self.files, self.order_N[at])
        number = int(self.order_N[at])
        file = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.files[file][number - int(self._first[file])]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row."""
        lengths = [file.lengths for file in self.files]
        return (lengths[0] if len(lengths) == 1 else np.concatenate(lengths))[self.order_N]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_labels(self) -> int:
        """Counted anew: reads every row."""
        return sum(row.num_labels for row in self)
