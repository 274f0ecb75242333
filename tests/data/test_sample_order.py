import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.core.data import sample_order
from adaptfleet.core.data.sample_order import epoch_order, permutation


@given(st.integers(0, 500), st.integers(0, 2**40), st.integers(0, 1000))
def test_every_row_stands_once_in_an_epoch(num_rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_rows, seed, epoch)
    assert sorted(order) == list(range(num_rows))
    assert order == epoch_order(num_rows, seed, epoch)


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_for_good() -> None:
    # A run that resumes under another NumPy must go on in the same order.
    assert epoch_order(8, seed=0, epoch=0) == [2, 1, 3, 4, 5, 7, 0, 6]


def test_a_long_order_is_sorted_by_its_draws_like_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = permutation(5_000, seed=3, epoch=2)
    monkeypatch.setattr(sample_order, "_DRAWN_TOGETHER", 700)
    assert np.array_equal(permutation(5_000, seed=3, epoch=2), at_once)
