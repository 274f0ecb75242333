"""Mixtures and the plan of steps: each row as often as said, the same at any world size, resumable from the step alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.core.data.datasets import open_dataset
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.mixture import Mixture
from adaptfleet.core.data.packing import pack_table, plan_packs
from adaptfleet.core.data.sample_order import epoch_order, permutation
from adaptfleet.core.steps import StepPlan, load_plan, plan_steps
from tests.data.test_sources import rows, write

MIXTURES = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=5).map(
    lambda parts: Mixture(tuple(size for size, _ in parts), tuple(weight for _, weight in parts))
)


def owners(mixture: Mixture, order: np.ndarray) -> list[int]:
    return Counter(np.searchsorted(np.cumsum(mixture.sizes), order, side="right").tolist())  # type: ignore[return-value]


@given(MIXTURES, st.integers(0, 2**40), st.integers(0, 50))
def test_each_source_gives_its_share_of_every_epoch(mixture: Mixture, seed: int, epoch: int) -> None:
    order = mixture.epoch(epoch, seed)
    assert len(order) == sum(mixture.sizes)
    found = owners(mixture, order)
    for i, weight in enumerate(mixture.weights):
        exact = len(order) * weight / sum(mixture.weights)
        # Rounding moves a share by less than one; more only where another source was about to get nothing at all.
        assert found[i] == mixture.counts()[i] >= 1
        assert abs(found[i] - exact) < 1 + len(mixture.sizes)
    assert (order == mixture.epoch(epoch, seed)).all()


@given(MIXTURES, st.integers(0, 1000), st.integers(1, 6))
def test_no_row_of_a_source_comes_again_before_all_have_come(mixture: Mixture, seed: int, num_epochs: int) -> None:
    times = Counter(np.concatenate([mixture.epoch(epoch, seed) for epoch in range(num_epochs)]).tolist())
    start = 0
    for size in mixture.sizes:
        counts = [times[row] for row in range(start, start + size)]
        assert max(counts) - min(counts) <= 1
        start += size


@given(st.integers(1, 300), st.floats(0.1, 9), st.integers(0, 2**40), st.integers(0, 100))
def test_one_source_gives_each_row_once_in_the_order_without_mixtures(size: int, weight: float, seed: int, epoch: int) -> None:
    assert Mixture((size,), (weight,)).epoch(epoch, seed).tolist() == epoch_order(size, seed, epoch)


def test_weights_like_sizes_give_each_row_once() -> None:
    mixture = Mixture((30, 70, 200), (0.3, 0.7, 2.0))
    assert mixture.counts() == [30, 70, 200]
    assert sorted(mixture.epoch(3, seed=1).tolist()) == list(range(300))


def test_a_small_source_repeats_and_a_large_one_is_spread() -> None:
    mixture = Mixture((10, 90), (1.0, 1.0))
    first, second = mixture.epoch(0, seed=0), mixture.epoch(1, seed=0)
    assert Counter(first[first < 10].tolist()) == dict.fromkeys(range(10), 5)
    large = [set(order[order >= 10].tolist()) for order in (first, second)]
    assert len(large[0]) == 50 and large[0] | large[1] == set(range(10, 100))


def test_the_order_is_the_same_for_good() -> None:
    # A run that resumes under another NumPy must go on in the same order.
    assert Mixture((3, 5), (1.0, 1.0)).epoch(1, seed=0).tolist() == [5, 1, 3, 2, 4, 0, 2, 3]


def encoded(lengths: list[int]) -> list[Encoded]:
    return [Encoded([1] * n, [False] + [True] * (n - 1)) for n in lengths]


def flat(plan: StepPlan) -> list[list[tuple[int, ...]]]:
    return [[pack.indices for pack in step] for step in plan.steps]


PLANS = st.tuples(
    st.lists(st.tuples(st.integers(1, 25), st.floats(0.1, 10)), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {"epochs": st.sampled_from([0.5, 1, 2, 2.5]), "packs_per_step": st.sampled_from([1, 2, 6]), "seed": st.integers(0, 9)}
    ),
    st.randoms(use_true_random=False),
)


@settings(deadline=None)
@given(PLANS)
def test_a_plan_takes_each_drawn_row_once_whatever_the_number_of_workers(drawn) -> None:  # type: ignore[no-untyped-def]
    parts, values, random = drawn
    mixture = Mixture(tuple(size for size, _ in parts), tuple(weight for _, weight in parts))
    data = encoded([random.randint(2, 16) for _ in range(sum(mixture.sizes))])
    train = TrainSpec.model_validate({"pack_tokens": 16, **values})
    plan = plan_steps(data, train, mixture)
    seen = Counter(i for step in plan.steps for pack in step for i in pack.indices)
    whole, part = int(train.epochs), train.epochs % 1
    expected: Counter[int] = Counter()
    for epoch in range(whole):
        expected.update(mixture.epoch(epoch, train.seed).tolist())
    if part:
        order = mixture.epoch(whole, train.seed).tolist()
        expected.update(order[: max(1, round(len(order) * part))])
    assert seen == expected
    assert plan.num_tokens == sum(len(data[i]) * times for i, times in seen.items())
    for num_workers in (1, 2, 3, 6):
        for step, packs in enumerate(plan.steps):
            shares = [plan.share(step, rank, num_workers) for rank in range(num_workers)]
            # Dealt out in turn, they give the step back.
            assert [shares[p % num_workers][p // num_workers] for p in range(len(packs))] == packs
    # A run that ends after any step and is planned anew goes on with the rest.
    assert flat(plan_steps(data, train, mixture)) == flat(plan)


@settings(deadline=None)
@given(PLANS, st.integers(1, 5))
def test_a_limit_of_steps_takes_the_plans_beginning(drawn, max_steps: int) -> None:  # type: ignore[no-untyped-def]
    parts, values, random = drawn
    mixture = Mixture(tuple(size for size, _ in parts), tuple(weight for _, weight in parts))
    data = encoded([random.randint(2, 16) for _ in range(sum(mixture.sizes))])
    whole = plan_steps(data, TrainSpec.model_validate({"pack_tokens": 16, **values}), mixture)
    cut = plan_steps(data, TrainSpec.model_validate({"pack_tokens": 16, **values, "max_steps": max_steps}), mixture)
    assert flat(cut) == flat(whole)[:max_steps]


def test_a_saved_plan_is_read_back(tmp_path: Path) -> None:
    plan = plan_steps(encoded([5, 9, 3, 7, 7, 2]), TrainSpec(epochs=2, pack_tokens=16, packs_per_step=2))
    plan.save(tmp_path)
    read = load_plan(tmp_path)
    assert flat(read) == flat(plan) and (read.num_tokens, read.fill, read.pack_tokens) == (plan.num_tokens, plan.fill, 16)
    assert read.steps[-1] == plan.steps[len(plan.steps) - 1]
    with pytest.raises(IndexError):
        read.steps[len(plan.steps)]


def test_many_lengths_are_packed_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500).astype(np.int32)
    order = permutation(500, seed=1, epoch=0)
    whole = plan_packs(lengths, 64, order.tolist())
    monkeypatch.setattr("adaptfleet.core.data.packing._PLANNED_TOGETHER", 7)
    assert list(pack_table(lengths, 64, order)) == whole


def test_a_mixture_of_files_holds_prompts_out_over_all_of_them(tmp_path: Path) -> None:
    # The same prompts stand in both sources: none may be trained on in one and held out in the other.
    write(tmp_path / "a.jsonl", rows(0, 60))
    write(tmp_path / "b.jsonl", [{**row, "completion": "another"} for row in rows(30, 60)])
    mixture = [{"source": str(tmp_path / "a.jsonl"), "weight": 3.0}, {"source": str(tmp_path / "b.jsonl")}]
    index = open_dataset(DataSpec.model_validate({"mixture": mixture, "test_fraction": 0.3}))
    data = index.load()
    assert not {e.prompt_key() for e in data.train} & {e.prompt_key() for e in data.test}
    assert len(data.train) + len(data.test) == 120 and index.weights == (3.0, 1.0)
    assert {e.origin.partition(",")[0] for e in data.test} == {"a.jsonl", "b.jsonl"}
    cut = open_dataset(DataSpec.model_validate({"mixture": mixture, "test_fraction": 0.3, "max_rows": 5}))
    assert list(map(len, cut.train_parts)) == [5, 5]


def test_a_mixture_can_be_tested_on_a_file_of_its_own(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 20), ("t", 40)):
        write(tmp_path / f"{name}.jsonl", rows(start, 20))
    spec = {"mixture": [{"source": f"{tmp_path}/a.jsonl"}, {"source": f"{tmp_path}/b.jsonl"}], "test": f"{tmp_path}/t.jsonl"}
    data = open_dataset(DataSpec.model_validate(spec)).load()
    assert [e.messages[0].content for e in data.test] == [f"p{i}" for i in range(40, 60)]
    assert len(data.train) == 40
