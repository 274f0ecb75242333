"""Which rows an epoch takes from each of several sources, and in which order: from the seed and the epoch alone."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptfleet.core.data.sample_order import permutation


@dataclass(frozen=True)
class Mixture:
    """Sources of `sizes` rows, which stand one after another in the rows to train on.

    An epoch has as many examples as there are rows, and each source gives its weight's share of them. A source goes through its rows in one
    seeded order after another, on from where the last epoch stopped: none of its rows comes again before all have come. So a small source
    with a large share repeats within an epoch, and a large one with a small share is spread over several. One source alone gives each
    row once an epoch.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def counts(self) -> list[int]:
        """Examples of each source in an epoch: the largest remainders are rounded up, and none is left out."""
        total = sum(self.sizes)
        exact = [total * weight / sum(self.weights) for weight in self.weights]
        counts = [max(1, math.floor(share)) for share in exact]
        while sum(counts) != total:
            short = [share - count for share, count in zip(exact, counts, strict=True)]
            if sum(counts) < total:
                counts[short.index(max(short))] += 1
            else:
                most = min((gap, i) for i, gap in enumerate(short) if counts[i] > 1)
                counts[most[1]] -= 1
        return counts

    def epoch(self, epoch: int, seed: int) -> npt.NDArray[np.int32]:
        """The rows of an epoch in their order."""
        if len(self.sizes) == 1:
            return permutation(self.sizes[0], seed, epoch)
        starts = np.cumsum([0, *self.sizes]).astype(np.int32)
        chosen = [
            starts[i] + self._turn(size, count, epoch, f"{seed}:{i}")
            for i, (size, count) in enumerate(zip(self.sizes, self.counts(), strict=True))
        ]
        return np.concatenate(chosen)[permutation(sum(self.sizes), seed, epoch)]

    def _turn(self, size: int, count: int, epoch: int, seed: str) -> npt.NDArray[np.int32]:
        """The source's rows number `epoch * count` to `(epoch + 1) * count` of its endless walk."""
        parts = []
        begin, end = epoch * count, (epoch + 1) * count
        for walk in range(begin // size, -(-end // size)):
            first, last = max(begin - walk * size, 0), min(end - walk * size, size)
            # The epoch is shuffled in any case, so a whole walk needs no order of its own.
            parts.append(np.arange(size, dtype=np.int32) if last - first == size else permutation(size, seed, walk)[first:last])
        return np.concatenate(parts)
