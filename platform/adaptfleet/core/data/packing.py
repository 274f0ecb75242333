"""Rows of one length filled with several examples each, so that no computation is spent on padding.

Packs are planned from the epoch's order before any worker takes its share: the plan is the same for every number of workers.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.disk_arrays import DiskArray
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.tokens import TokenRow

NUM_OPEN_PACKS = 64
"""Packs that wait for a fitting example. More fill better and mix the order less."""
_PLANNED_TOGETHER = 65_536
"""Lengths that are Python's numbers at a time."""


@dataclass(frozen=True)
class Pack:
    """Which examples one packed row holds, in the order in which they stand in it."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class PackTable(Sequence[Pack]):
    """Many packs in two arrays: pack p holds `indices_N[starts_P[p] : starts_P[p + 1]]`."""

    indices_N: npt.NDArray[np.int32]
    starts_P: npt.NDArray[np.int64]
    """One more than there are packs: the last is the number of indices."""

    def __len__(self) -> int:
        return len(self.starts_P) - 1

    @overload
    def __getitem__(self, at: int) -> Pack: ...
    @overload
    def __getitem__(self, at: slice) -> list[Pack]: ...
    def __getitem__(self, at: int | slice) -> Pack | list[Pack]:
        if isinstance(at, slice):
            return [self[p] for p in range(*at.indices(len(self)))]
        p = range(len(self))[at]
        return Pack(tuple(self.indices_N[self.starts_P[p] : self.starts_P[p + 1]].tolist()))

    @classmethod
    def joined(cls, tables: "Iterable[PackTable]", num_packs: int | None = None) -> "PackTable":
        """The tables one after another, on disk, cut to the first `num_packs`; no more tables are taken than that needs."""
        sizes: list[npt.NDArray[np.int64]] = []
        indices = DiskArray(np.int32)
        for table in tables:
            sizes.append(np.diff(table.starts_P))
            indices.append(table.indices_N)
            if num_packs is not None and sum(map(len, sizes)) >= num_packs:
                break
        sizes_P = np.concatenate(sizes)[:num_packs]
        starts_P = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes_P, dtype=np.int64)])
        return cls(indices.mapped()[: starts_P[-1]], starts_P)


def plan_packs(lengths: Sequence[int] | npt.NDArray[np.int32], pack_tokens: int, order: Sequence[int]) -> list[Pack]:
    """`pack_table` as a list, for a few rows."""
    return list(pack_table(np.asarray(lengths, dtype=np.int32), pack_tokens, np.asarray(order, dtype=np.int32)))


def pack_table(lengths_N: npt.NDArray[np.int32], pack_tokens: int, order_M: npt.NDArray[np.int32]) -> PackTable:
    """Best fit with a bounded number of open packs: each example of the order goes where it leaves the least room.

    `lengths_N` has the number of tokens of each example, `order_M` the indices of those to pack. The packs stand in the order in which they
    were begun. DataError lists the examples that are longer than a pack.
    """
    if len(lengths_N) and lengths_N.max() > pack_tokens and len(too_long := order_M[lengths_N[order_M] > pack_tokens]):
        shown = ", ".join(f"{i} ({lengths_N[i]})" for i in too_long[:20].tolist())
        raise DataError(
            f"{len(too_long)} examples are longer than a pack of {pack_tokens} tokens: {shown}{', ...' if len(too_long) > 20 else ''}."
        )
    pack_of_M = np.empty(len(order_M), dtype=np.int32)
    num_packs = 0
    # Open packs as (room left, number), sorted: the first with enough room is the best fit, the oldest among equals.
    open_packs: list[tuple[int, int]] = []
    for begin in range(0, len(order_M), _PLANNED_TOGETHER):
        numbers: list[int] = []
        for length in lengths_N[order_M[begin : begin + _PLANNED_TOGETHER]].tolist():
            at = bisect.bisect_left(open_packs, (length, -1))
            if at < len(open_packs):
                room, number = open_packs.pop(at)
            else:
                room, number = pack_tokens, num_packs
                num_packs += 1
                if len(open_packs) == NUM_OPEN_PACKS:
                    # The fullest has the least hope of another example.
                    open_packs.pop(0)
            numbers.append(number)
            bisect.insort(open_packs, (room - length, number))
        pack_of_M[begin : begin + len(numbers)] = numbers
    starts_P = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(pack_of_M, minlength=num_packs))])
    return PackTable(_by_pack(pack_of_M, order_M, starts_P), starts_P)


def _by_pack(pack_of_M: npt.NDArray[np.int32], order_M: npt.NDArray[np.int32], starts_P: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The order, sorted by pack and in the order within each; a run of it at a time, each pack going on where the last run left it."""
    sorted_M = np.empty(len(order_M), dtype=np.int32)
    next_P = starts_P[:-1].copy()
    for begin in range(0, len(order_M), _PLANNED_TOGETHER):
        packs = pack_of_M[begin : begin + _PLANNED_TOGETHER]
        by_pack = np.argsort(packs, kind="stable")
        packs = packs[by_pack]
        firsts = np.flatnonzero(np.diff(packs, prepend=-1))
        sizes = np.diff(firsts, append=len(packs))
        sorted_M[next_P[packs] + np.arange(len(packs)) - np.repeat(firsts, sizes)] = order_M[begin : begin + _PLANNED_TOGETHER][by_pack]
        next_P[packs[firsts]] += sizes
    return sorted_M


def fill_ratio(packs: Sequence[Pack], lengths: Sequence[int], pack_tokens: int) -> float:
    """Share of the packs' tokens that is no padding."""
    return sum(lengths[i] for pack in packs for i in pack.indices) / (len(packs) * pack_tokens) if packs else 0.0


def pack_arrays(
    pack: Pack, encoded: Sequence[Encoded] | Sequence[TokenRow], pack_tokens: int, pad_id: int
) -> dict[str, npt.NDArray[np.generic]]:
    """One packed row, arrays of length T = pack_tokens.

    input_ids_T     int64, padded at the end with `pad_id`
    position_ids_T  int64, from 0 in each example and in the padding: this is how attention tells the examples apart
    label_mask_T    bool, True where the token is one to predict (from the token before it, which is of the same example); False in padding
    segment_ids_T   int64, from 0, one number an example, two a preference (chosen, then rejected); the padding is a segment of its own
    """
    examples = [encoded[i] for i in pack.indices]
    num_tokens = sum(len(e) for e in examples)
    if num_tokens > pack_tokens:
        raise DataError(f"a pack of {num_tokens} tokens does not fit in {pack_tokens}.")
    input_ids_T = np.full(pack_tokens, pad_id, dtype=np.int64)
    position_ids_T = np.empty(pack_tokens, dtype=np.int64)
    label_mask_T = np.zeros(pack_tokens, dtype=np.bool_)
    segment_ids_T = np.empty(pack_tokens, dtype=np.int64)
    start = segment = 0
    for example in examples:
        end = start + len(example)
        input_ids_T[start:end] = example.input_ids
        label_mask_T[start:end] = example.label_mask
        places = [start, start + example.split, end] if example.split else [start, end]
        for first, past in itertools.pairwise(places):
            position_ids_T[first:past] = np.arange(past - first)
            segment_ids_T[first:past] = segment
            segment += 1
        start = end
    segment_ids_T[start:] = segment
    position_ids_T[start:] = np.arange(pack_tokens - start)
    return {"input_ids_T": input_ids_T, "position_ids_T": position_ids_T, "label_mask_T": label_mask_T, "segment_ids_T": segment_ids_T}
