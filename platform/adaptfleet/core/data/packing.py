"""Rows of one length filled with several examples each, so that no computation is spent on padding.

Packs are planned from the epoch's order before any worker takes its share: the plan is the same for every number of workers.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.encoding import Encoded

NUM_OPEN_PACKS = 64
"""Packs that wait for a fitting example. More fill better and mix the order less."""


@dataclass(frozen=True)
class Pack:
    """Which examples one packed row holds, in the order in which they stand in it."""

    indices: tuple[int, ...]


def plan_packs(lengths: Sequence[int], pack_tokens: int, order: Sequence[int]) -> list[Pack]:
    """Best fit with a bounded number of open packs: each example of the order goes where it leaves the least room.

    `lengths` has the number of tokens of each example, `order` the indices of those to pack. The packs stand in the order in which they
    were begun. DataError lists the examples that are longer than a pack.
    """
    too_long = [i for i in order if lengths[i] > pack_tokens]
    if too_long:
        shown = ", ".join(f"{i} ({lengths[i]})" for i in too_long[:20])
        raise DataError(
            f"{len(too_long)} examples are longer than a pack of {pack_tokens} tokens: {shown}{', ...' if len(too_long) > 20 else ''}."
        )
    contents: list[list[int]] = []
    # Open packs as (room left, number), sorted: the first with enough room is the best fit, the oldest among equals.
    open_packs: list[tuple[int, int]] = []
    for i in order:
        at = bisect.bisect_left(open_packs, (lengths[i], -1))
        if at < len(open_packs):
            room, number = open_packs.pop(at)
            contents[number].append(i)
        else:
            room, number = pack_tokens, len(contents)
            contents.append([i])
            if len(open_packs) == NUM_OPEN_PACKS:
                # The fullest has the least hope of another example.
                open_packs.pop(0)
        bisect.insort(open_packs, (room - lengths[i], number))
    return [Pack(tuple(indices)) for indices in contents]


def fill_ratio(packs: Sequence[Pack], lengths: Sequence[int], pack_tokens: int) -> float:
    """Share of the packs' tokens that is no padding."""
    return sum(lengths[i] for pack in packs for i in pack.indices) / (len(packs) * pack_tokens) if packs else 0.0


def pack_arrays(pack: Pack, encoded: Sequence[Encoded], pack_tokens: int, pad_id: int) -> dict[str, npt.NDArray[np.generic]]:
    """One packed row, arrays of length T = pack_tokens.

    input_ids_T     int64, padded at the end with `pad_id`
    position_ids_T  int64, from 0 in each example and in the padding: this is how attention tells the examples apart
    label_mask_T    bool, True where the token is one to predict (from the token before it, which is of the same example); False in padding
    segment_ids_T   int64, from 0, one number an example; the padding is a segment of its own
    """
    examples = [encoded[i] for i in pack.indices]
    num_tokens = sum(len(e) for e in examples)
    if num_tokens > pack_tokens:
        raise DataError(f"a pack of {num_tokens} tokens does not fit in {pack_tokens}.")
    input_ids_T = np.full(pack_tokens, pad_id, dtype=np.int64)
    position_ids_T = np.empty(pack_tokens, dtype=np.int64)
    label_mask_T = np.zeros(pack_tokens, dtype=np.bool_)
    segment_ids_T = np.full(pack_tokens, len(examples), dtype=np.int64)
    start = 0
    for segment, example in enumerate(examples):
        end = start + len(example)
        input_ids_T[start:end] = example.input_ids
        position_ids_T[start:end] = np.arange(len(example))
        label_mask_T[start:end] = example.label_mask
        segment_ids_T[start:end] = segment
        start = end
    position_ids_T[start:] = np.arange(pack_tokens - start)
    return {"input_ids_T": input_ids_T, "position_ids_T": position_ids_T, "label_mask_T": label_mask_T, "segment_ids_T": segment_ids_T}
