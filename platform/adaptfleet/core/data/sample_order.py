"""The order of the rows in an epoch: from the seed and the epoch alone, whatever the number of workers."""

import hashlib

import numpy as np
import numpy.typing as npt


def permutation(num_rows: int, seed: int | str, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of range(num_rows). NumPy promises Philox's raw stream for good, unlike `Generator.permutation`."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:16], dtype=np.uint64)
    draws_N = np.random.Philox(key=key).random_raw(num_rows)
    return np.argsort(draws_N, kind="stable")


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The same as a list."""
    return permutation(num_rows, seed, epoch).tolist()
