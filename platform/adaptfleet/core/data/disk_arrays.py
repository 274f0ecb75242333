"""Arrays with an entry for each row, on disk where they are long: they grow with the data, and memory must not."""

import mmap
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.home import home

_HELD_BYTES = 2**20
"""Up to so much stays in memory."""


class DiskArray:
    """Grows at its end, and is then read where it lies: in a file without a name, which goes with the last array that refers to it."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._held = bytearray()
        self._file: IO[bytes] | None = None

    def append(self, values: npt.NDArray[Any] | bytes | bytearray) -> None:
        self._held += values if isinstance(values, bytes | bytearray) else np.ascontiguousarray(values, dtype=self._dtype).tobytes()
        if len(self._held) > _HELD_BYTES:
            self._write()

    def mapped(self) -> npt.NDArray[Any]:
        """What was appended, one after another. Nothing can be appended any more."""
        if self._file is None:
            return np.frombuffer(bytes(self._held), dtype=self._dtype)
        self._write()
        with self._file as file:
            file.flush()
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=self._dtype)

    def _write(self) -> None:
        folder = home() / "cache"
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it outlives this call
            self._file.write(self._held)
        except OSError as error:
            raise DataError(f"cannot write an index of the rows below {folder}: {error.strerror}. Free space there.") from None
        self._held.clear()


def joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The arrays one after another, along their first axis."""
    if len(arrays) == 1:
        return arrays[0]
    whole = DiskArray(arrays[0].dtype)
    for array in arrays:
        whole.append(array)
    return whole.mapped().reshape(-1, *arrays[0].shape[1:])
