"""How the rows of one batch are shared out between products.

Rows of one request stand together. A long run of one adapter (a prompt) gets products of that adapter alone, a long run of the base gets
none, and everything else (decoding rows, short prompts) shares the stacked and masked products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

LONG_RUN = 32
"""Rows from which an adapter's own products are cheaper than its share of the stacked ones."""
BASE = -1
"""The slot of a row without an adapter, as vLLM marks it."""


@dataclass(frozen=True, slots=True)
class Segment:
    start: int
    stop: int
    slots: tuple[int, ...]
    """The slots stacked for these rows, in ascending order."""


def segments(token_slots: Sequence[int], recent_slots: frozenset[int] = frozenset()) -> list[Segment]:
    """Segments in the order of their rows; a row in none of them is the base's. Mixed segments stack `recent_slots` too, so that an adapter
    that comes and goes does not rebuild the stacks each time."""
    alone: list[Segment] = []
    mixed: list[tuple[int, int]] = []
    row = 0
    for slot, run in groupby(token_slots):
        stop = row + sum(1 for _ in run)
        if stop - row >= LONG_RUN:
            if slot != BASE:
                alone.append(Segment(row, stop, (slot,)))
        elif mixed and mixed[-1][1] == row:
            mixed[-1] = (mixed[-1][0], stop)
        else:
            mixed.append((row, stop))
        row = stop
    present = {slot for start, stop in mixed for slot in token_slots[start:stop]} - {BASE}
    stacked = tuple(sorted(present | (recent_slots if present else frozenset())))
    shared = [Segment(start, stop, stacked) for start, stop in mixed if any(slot != BASE for slot in token_slots[start:stop])]
    return sorted(alone + shared, key=lambda segment: segment.start)
