from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.encoding import Encoded, encode_all
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.data.packing import Pack, fill_ratio, pack_arrays, plan_packs
from adaptfleet.core.data.sample_order import epoch_order

LENGTHS = st.lists(st.integers(1, 64), max_size=400)


@given(LENGTHS, st.integers(0, 10), st.integers(0, 3))
def test_every_example_stands_in_one_pack_and_none_overflows(lengths: list[int], seed: int, epoch: int) -> None:
    order = epoch_order(len(lengths), seed, epoch)
    packs = plan_packs(lengths, 64, order)
    assert sorted(i for pack in packs for i in pack.indices) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack.indices) <= 64 for pack in packs)
    assert packs == plan_packs(lengths, 64, order)


@given(LENGTHS.filter(bool))
def test_packs_are_at_least_half_full_on_the_whole(lengths: list[int]) -> None:
    # Any two packs that are open together hold more than one pack's tokens, and a pack is closed only as the fullest of 64.
    packs = plan_packs(lengths, 64, range(len(lengths)))
    assert len(packs) == 1 or fill_ratio(packs, lengths, 64) > 0.5


def test_short_examples_fill_packs_almost_whole() -> None:
    lengths = (np.random.RandomState(0).gamma(6.0, 15.0, size=2000).astype(int) + 10).clip(max=1024).tolist()
    packs = plan_packs(lengths, 1024, epoch_order(len(lengths), 0, 0))
    assert fill_ratio(packs, lengths, 1024) > 0.98


def test_each_example_goes_where_it_leaves_the_least_room() -> None:
    lengths = [6, 5, 4, 5, 4]
    assert plan_packs(lengths, 10, range(5)) == [Pack((0, 2)), Pack((1, 3)), Pack((4,))]
    assert fill_ratio(plan_packs(lengths, 10, range(5)), lengths, 10) == pytest.approx(0.8)


def test_part_of_the_rows_can_be_packed_and_nothing_gives_nothing() -> None:
    assert plan_packs([5, 6, 7], 10, [2]) == [Pack((2,))]
    assert plan_packs([], 10, []) == []
    assert fill_ratio([], [], 10) == 0.0


def test_examples_longer_than_a_pack_are_listed() -> None:
    with pytest.raises(DataError, match=r"2 examples are longer than a pack of 10 tokens: 1 \(11\), 3 \(12\)\."):
        plan_packs([1, 11, 10, 12], 10, range(4))


ENCODED = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=40)


@given(ENCODED)
def test_arrays_hold_each_example_whole_and_apart(drawn: list[list[tuple[int, bool]]]) -> None:
    encoded = [Encoded([t for t, _ in e], [False, *(m for _, m in e[1:])]) for e in drawn]
    for pack in plan_packs([len(e) for e in encoded], 32, range(len(encoded))):
        arrays = pack_arrays(pack, encoded, 32, pad_id=777)
        segments = arrays["segment_ids_T"]
        for segment, i in enumerate(pack.indices):
            inside = segments == segment
            assert arrays["input_ids_T"][inside].tolist() == encoded[i].input_ids
            assert arrays["label_mask_T"][inside].tolist() == encoded[i].label_mask
            assert arrays["position_ids_T"][inside].tolist() == list(range(len(encoded[i])))
        padding = segments == len(pack.indices)
        assert (arrays["input_ids_T"][padding] == 777).all()
        assert not arrays["label_mask_T"][padding].any()
        assert arrays["position_ids_T"][padding].tolist() == list(range(int(padding.sum())))
        assert (np.diff(segments) >= 0).all()
        # No label stands at a segment's start, where the token before it is another example's.
        assert not arrays["label_mask_T"][arrays["position_ids_T"] == 0].any()


def test_dtypes_and_shapes() -> None:
    arrays = pack_arrays(Pack((0,)), [Encoded([1, 2], [False, True])], 5, pad_id=0)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "input_ids_T": ((5,), "int64"),
        "position_ids_T": ((5,), "int64"),
        "label_mask_T": ((5,), "bool"),
        "segment_ids_T": ((5,), "int64"),
    }


def test_a_pack_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="a pack of 4 tokens does not fit in 3"):
        pack_arrays(Pack((0, 0)), [Encoded([1, 2], [False, True])], 3, pad_id=0)


def test_the_labels_of_an_epoch_of_packs_read_as_the_answers(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    examples = [Example((Message("user", f"question {i}" * (i % 5 + 1)), Message("assistant", f"answer {i}"))) for i in range(100)]
    encoded = encode_all(examples, tokenizer, 256)
    read = []
    for pack in plan_packs([len(e) for e in encoded], 256, epoch_order(100, 0, 0)):
        arrays = pack_arrays(pack, encoded, 256, tokenizer.pad_token_id)
        read += tokenizer.decode(arrays["input_ids_T"][arrays["label_mask_T"]]).split("<|im_end|>")[:-1]
    assert sorted(read) == sorted(f"answer {i}" for i in range(100))
