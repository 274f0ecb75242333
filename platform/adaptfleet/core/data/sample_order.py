"""The order of the rows in an epoch: from the seed and the epoch alone, whatever the number of workers."""

import hashlib

import numpy as np
import numpy.typing as npt

_DRAWN_TOGETHER = 65_536
_BUCKET_BITS = 4


def permutation(num_rows: int, seed: int | str, epoch: int) -> npt.NDArray[np.int32]:
    """A permutation of range(num_rows): its numbers by a draw for each. NumPy promises Philox's raw stream for good, unlike
    `Generator.permutation`. Many are sorted a sixteenth of the draws' range at a time, so that hardly more than the result is held.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:16], dtype=np.uint64)
    if num_rows <= _DRAWN_TOGETHER:
        return np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable").astype(np.int32)
    order_N = np.empty(num_rows, dtype=np.int32)
    filled = 0
    for bucket in range(2**_BUCKET_BITS):
        stream = np.random.Philox(key=key)
        numbers, draws = [], []
        for first in range(0, num_rows, _DRAWN_TOGETHER):
            drawn = stream.random_raw(min(_DRAWN_TOGETHER, num_rows - first))
            mine = np.flatnonzero(drawn >> np.uint64(64 - _BUCKET_BITS) == bucket)
            numbers.append((mine + first).astype(np.int32))
            draws.append(drawn[mine])
        by_draw = np.argsort(np.concatenate(draws), kind="stable")
        order_N[filled : filled + len(by_draw)] = np.concatenate(numbers)[by_draw]
        filled += len(by_draw)
    return order_N


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The same as a list."""
    return permutation(num_rows, seed, epoch).tolist()
