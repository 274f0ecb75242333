"""The rows that calibrate: exactly as many as asked for, with text enough, or refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adaptfleet.contracts.compression import CalibrationSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.datasets import open_dataset
from adaptfleet.core.data.encoding import Encoded, encode_all
from adaptfleet.core.data.mixture import Mixture

MIN_TOKENS = 512
"""Fewer say nothing of a layer's activations."""


def calibration_rows(
    spec: CalibrationSpec, tokenizer: Any, fetch: Callable[[str], Path] | None = None, place: str = "calibration"
) -> list[Encoded]:
    """The first `num_rows` training rows in the seeded order, of a mixture by its weights, cut to `max_tokens`. DataError: too few, too
    short, or preferences. `place`: the contract's name of what is told."""
    index = open_dataset(spec.data, fetch)
    numbers = index.train
    if len(index.train_parts) > 1:
        order = Mixture(tuple(map(len, index.train_parts)), index.weights).epoch(0, spec.data.seed)
        numbers = numbers[np.array(list(dict.fromkeys(order.tolist())))]
    if len(numbers) < spec.num_rows:
        raise DataError(
            f"{place}: {spec.data.name()!r} has {len(numbers)} training rows, but num_rows asks for {spec.num_rows}. "
            f"Lower {place}.num_rows, or name a larger data set."
        )
    examples = index.examples_at(numbers[: spec.num_rows])
    preferences = [example for example in examples if example.rejected is not None]
    if preferences:
        raise DataError(
            f"{place}: {len(preferences)} of {len(examples)} rows of {spec.data.name()!r} (the first: {preferences[0].origin}) have a "
            f"chosen and a rejected answer; calibration takes rows of messages, of prompt and completion, or of text."
        )
    rows = encode_all(examples, tokenizer, spec.max_tokens, truncate=True)
    num_tokens = sum(len(row) for row in rows)
    if num_tokens < MIN_TOKENS:
        raise DataError(
            f"{place}: the {len(rows)} rows have {num_tokens} tokens, fewer than {MIN_TOKENS}, which say too little of activations. "
            f"Raise {place}.num_rows or max_tokens, or name longer rows."
        )
    return rows


def rows_sha256(rows: list[Encoded]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.input_ids, row.label_mask]).encode())
    return digest.hexdigest()
