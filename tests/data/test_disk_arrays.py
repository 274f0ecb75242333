"""What grows with the rows lies on disk, and in pieces gives what it gives at once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.core.data import datasets, disk_arrays, packing, scan
from adaptfleet.core.data.disk_arrays import DiskArray, joined

NUMBERS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=60)


def test_a_long_array_lies_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTFLEET_HOME", str(tmp_path))
    monkeypatch.setattr(disk_arrays, "_HELD_BYTES", 64)
    values = np.arange(100, dtype=np.int32)
    array = DiskArray(np.int32)
    for part in np.split(values, [3, 40, 41, 90]):
        array.append(part)
    found = array.mapped()
    assert np.array_equal(found, values)
    assert (tmp_path / "cache").is_dir() and not list((tmp_path / "cache").iterdir())
    pairs = joined([found.reshape(-1, 2), values[:6].reshape(-1, 2)])
    assert pairs.shape == (53, 2) and np.array_equal(pairs[-1], [4, 5])
    assert len(DiskArray(np.uint8).mapped()) == 0


@given(NUMBERS)
def test_repeated_rows_are_counted_alike_in_buckets(digests: list[int]) -> None:
    digests_N2 = np.asarray([digests, digests], dtype=np.uint64).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_HASHED_TOGETHER", 7)
        numbers = np.arange(len(digests), dtype=np.int32)
        assert scan.num_repeated(digests_N2, numbers) == len(digests) - len(set(digests))
        chosen = np.asarray([digest % 3 == 0 for digest in digests], dtype=np.bool_)
        assert scan.chosen_sha256(digests_N2, chosen) == scan.rows_sha256(digests_N2, np.flatnonzero(chosen))


@given(NUMBERS.filter(lambda numbers: len(set(numbers)) > 1), st.floats(0.01, 0.99))
def test_the_last_prompt_held_out_is_that_of_the_sorted_ones(prompts: list[int], fraction: float) -> None:
    places = sorted(set(prompts))
    num_held_out = sum(place / 2**64 < fraction for place in places)
    expected = places[min(max(1, num_held_out), len(places) - 1) - 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "_SOUGHT_TOGETHER", 7)
        found = datasets.last_held_out([np.asarray(prompts[:5], dtype=np.uint64), np.asarray(prompts[5:], dtype=np.uint64)], fraction)
    assert int(found) == expected


@given(st.lists(st.integers(1, 64), max_size=200), st.randoms(use_true_random=False))
def test_packs_planned_in_pieces_are_those_planned_at_once(lengths: list[int], random: object) -> None:
    order = np.arange(len(lengths), dtype=np.int32)
    random.shuffle(order)  # type: ignore[attr-defined]
    at_once = packing.plan_packs(lengths, 64, order.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PLANNED_TOGETHER", 11)
        assert packing.plan_packs(lengths, 64, order.tolist()) == at_once
