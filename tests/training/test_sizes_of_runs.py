"""What a contract says about the size of a step and of the cluster: resolved the same way everywhere, or refused at once."""

from typing import Any

import pytest
from pydantic import ValidationError

from adaptfleet.contracts.jobs import FinetuneJob, TrainSpec
from adaptfleet.core.steps import plan_steps
from adaptfleet.on_ray.train.places import equal_share, num_places, shortage
from tests.training.test_methods import rows


def job(**sections: Any) -> FinetuneJob:
    return FinetuneJob.model_validate({"publish": None, **sections})


def test_tokens_of_a_step_are_the_same_packs_for_any_number_of_workers() -> None:
    for workers in (1, 2, 4, {"min": 1, "max": 4}):
        assert job(train={"pack_tokens": 512, "tokens_per_step": 4096}, cluster={"workers": workers}).train.num_packs == 8
    in_tokens = TrainSpec(epochs=2, pack_tokens=64, tokens_per_step=192)
    in_packs = TrainSpec(epochs=2, pack_tokens=64, packs_per_step=3)
    assert list(plan_steps(rows(), in_tokens).steps) == list(plan_steps(rows(), in_packs).steps)
    assert job().train.num_packs == 1


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"packs_per_step": 2, "tokens_per_step": 2048}}, r"packs_per_step \(2\) and tokens_per_step \(2048\) both give"),
        ({"train": {"tokens_per_step": 3000}}, r"3000, no multiple of pack_tokens \(1024\); use 2048 or 3072"),
        ({"train": {"tokens_per_step": 100}}, r"no multiple of pack_tokens \(1024\); use 1024"),
        (
            {"train": {"tokens_per_step": 3072}, "cluster": {"workers": 2}},
            "tokens_per_step is 3072, 3 packed rows of 1024 tokens, which 2 workers cannot share evenly; use a multiple of 2",
        ),
        ({"train": {"tokens_per_step": 1024}, "cluster": {"workers": {"min": 1, "max": 4}}}, "fewer than the 4 workers there may be"),
        ({"cluster": {"workers": 3, "tensor_parallel": 2}}, r"workers is 3, no multiple of tensor_parallel \(2\)"),
        ({"cluster": {"workers": 1, "tensor_parallel": 2}}, r"workers is 1, no multiple of tensor_parallel \(2\)"),
        ({"cluster": {"workers": {"min": 2, "max": 4}, "tensor_parallel": 2}}, "makes no whole groups; give a number of workers"),
        ({"cluster": {"workers": 2, "tensor_parallel": 2, "shard": "ddp"}}, "use auto or fsdp2"),
        ({"cluster": {"workers": 4, "tensor_parallel": 2}}, "packs_per_step is 1, fewer than the 2 groups of 2 workers"),
        ({"cluster": {"workers": 2, "tensor_parallel": 2}, "method": {"use_dora": True}}, "use_dora takes the norm of whole columns"),
        (
            {"cluster": {"workers": 2, "shard": "fsdp2"}, "method": {"kind": "adalora"}, "train": {"packs_per_step": 2}},
            "ranks whole matrices",
        ),
        ({"cluster": {"workers": 2, "tensor_parallel": 2}, "method": {"kind": "qlora"}}, "packed without regard to rows and columns"),
        (
            {"cluster": {"workers": 2, "tensor_parallel": 2}, "method": {"kind": "ia3"}},
            "'ia3' cannot be trained with cluster.tensor_parallel 2",
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        job(**sections)


def test_groups_of_workers_take_one_share_each() -> None:
    assert job(cluster={"workers": 2, "tensor_parallel": 2}).cluster.num_shares == 1
    assert job(cluster={"workers": 8, "tensor_parallel": 2}, train={"packs_per_step": 4}).cluster.num_shares == 4


SMALL_NODES = [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("workers", "each", "limits", "says"),
    [
        (3, {"CPU": 2, "GPU": 0}, {}, None),
        (5, {"CPU": 2, "GPU": 0}, {}, "5 workers want 10 CPUs where the cluster has 8"),
        (2, {"CPU": 1, "GPU": 1}, {}, "2 workers want 2 GPUs where the cluster has 1"),
        (1, {"CPU": 4, "GPU": 0}, {}, "room for 0: what a worker wants must be on one node"),
        (4, {"CPU": 2, "GPU": 0}, {}, "room for 3"),
        (1, {"CPU": 3, "GPU": 1}, {}, "1 workers want 3 CPUs and 1 GPUs each, and the cluster's nodes have room for 0"),
        (5, {"CPU": 2, "GPU": 0}, {"CPU": 64}, None),
        (40, {"CPU": 2, "GPU": 0}, {"CPU": 64}, "80 CPUs where the cluster has 64"),
    ],
)
def test_workers_that_can_never_start_are_refused_at_once(
    workers: int, each: dict[str, float], limits: dict[str, float], says: str
) -> None:
    reason = shortage(workers, each, SMALL_NODES, limits)
    assert reason is None if says is None else reason is not None and says in reason


def test_an_equal_share_has_a_place_on_a_node() -> None:
    assert num_places({"CPU": 1}, SMALL_NODES) == 8
    assert equal_share(1, 8, SMALL_NODES) == 3
    assert equal_share(2, 8, SMALL_NODES) == 3
    assert equal_share(3, 8, SMALL_NODES) == 2
    assert equal_share(8, 8, SMALL_NODES) == equal_share(20, 8, SMALL_NODES) == 1
