"""Which points come, and which trials end early."""

import time
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.schemes import Mixed, WeightOnly
from adaptfleet.contracts.search import Point, SweepJob
from adaptfleet.contracts.search_points import point_id
from adaptfleet.on_ray.tune.plan import TO_NEAREST
from adaptfleet.on_ray.tune.searcher import PointSearcher
from adaptfleet.on_ray.tune.stopping import DominanceStopper
from adaptfleet.on_ray.tune.sweep_folder import Cost, Record, StepLock, SweepFolder


@pytest.fixture
def folder(fresh_home: Path) -> SweepFolder:
    return SweepFolder.open(job())


def job(space: str = "joint", *overrides: str) -> SweepJob:
    return parse_contract(SweepJob, f"{{job: sweep, name: s, space: {space}, max_concurrent: 1}}", overrides)


def ended(folder: SweepFolder, point: Point, status: Any = "finished", **metrics: float) -> None:
    folder.record(Record(point_id(point), point, status, metrics, ended_at=time.time()))


def all_points(sweep: SweepJob, folder: SweepFolder, limit: int = 100) -> list[str]:
    """Runs the searcher against trials that finish at once, with a loss that the ratio decides."""
    searcher = PointSearcher(sweep, folder)
    found = []
    for number in range(limit):
        suggestion = searcher.suggest(f"t{number}")
        if suggestion == Searcher.FINISHED:
            break
        point = suggestion["point"]
        assert searcher.suggest("too many") is None, "one at a time"
        found.append(point_id(point))
        ended(folder, point, nll=1 + (point.get("ratio") or 0), bytes=1e8, eval_loss=abs((point.get("learning_rate") or 0) - 1e-3))
        searcher.on_trial_complete(f"t{number}", {"point_id": point_id(point)})
    return found


def test_a_grid_is_gone_through_once_and_taken_up_where_it_stopped(folder: SweepFolder) -> None:
    first = all_points(job(), folder, limit=5)
    assert first[0] == "ranknone-ratio0-bits16"
    failed = {"rank": 8, "ratio": 0.1, "bits": "4"}
    ended(folder, failed, "failed")
    rest = all_points(job(), folder)
    assert len(first) + len(rest) == 27 == len({*first, *rest})
    assert point_id(failed) in rest, "what failed is tried again"
    assert all_points(job(), folder) == []


@pytest.mark.parametrize("algorithm", ["{kind: random, seed: 3}", "{kind: optuna, seed: 3}", "{kind: optuna, sampler: nsga2, seed: 3}"])
def test_no_point_is_drawn_twice_and_the_baseline_comes_first(folder: SweepFolder, algorithm: str) -> None:
    sweep = job("joint", f"algorithm={algorithm}", "budget={trials: 12}")
    first = all_points(sweep, folder, limit=5)
    rest = all_points(sweep, folder)
    assert first[0] == "ranknone-ratio0-bits16"
    assert len(first) == 5 and len(rest) == 7 and len({*first, *rest}) == 12
    whole = job("joint", f"algorithm={algorithm}", "budget={trials: 500}")
    assert len({*first, *rest, *all_points(whole, folder)}) >= 25, "a finite space comes to its end"


def test_axes_that_do_not_apply_are_not_drawn(folder: SweepFolder) -> None:
    sweep = job("prune_then_quantize", "algorithm={kind: optuna}", "budget={trials: 25}")
    found = all_points(sweep, folder)
    assert len(found) == 25
    assert all(("importancenone" in name) == ("ratio0-" in name) for name in found)


def test_tpe_learns_from_what_was_found(folder: SweepFolder) -> None:
    sweep = job("learning_rate", "algorithm={kind: optuna, seed: 1}", "budget={trials: 40}")
    all_points(sweep, folder)
    rates = [record.point["learning_rate"] for record in folder.records().values()]
    distances = [abs(float(rate or 0) - 1e-3) for rate in rates]
    assert sum(distances[20:]) < sum(distances[:20]) / 2


def test_the_budget_of_tokens_is_not_gone_beyond(folder: SweepFolder) -> None:
    folder.add_cost("recover-1", Cost(1.0, 1.0, 5000))
    assert all_points(job("joint", "budget={train_tokens: 5000}"), folder) == []
    assert len(all_points(job("joint", "budget={train_tokens: 5001}"), folder)) == 27


def report(name: str, stage: str, loss: float, dense: float = 2e8, **more: Any) -> dict[str, Any]:
    return {"point_id": name, "stage": stage, "eval_loss": loss, "nll": loss, "dense_bytes": dense, "bytes": dense, "rounding": "x", **more}


def test_what_is_behind_in_everything_ends() -> None:
    stopper = DominanceStopper(job())
    assert not stopper("", report("a", "training 1/3", 1.0))
    assert not stopper("", report("b", "training 1/3", 1.04)), "within the margin"
    assert stopper("", report("c", "training 1/3", 1.2)) and "a was ahead at training 1/3" in stopper.reasons["c"]
    assert not stopper("", report("d", "training 1/3", 1.2, dense=1e8)), "it is smaller"
    assert not stopper("", report("e", "training 2/3", 1.2)), "the others were not there yet"
    assert not stopper("", report("ranknone-ratio0-bits16", "training 1/3", 9.0)), "the baseline is always in the comparison"


def test_a_rounded_point_ends_what_is_worse_before_rounding() -> None:
    stopper = DominanceStopper(job())
    assert not stopper("", report("small", "finished", 1.0, bytes=1e8))
    assert stopper("", report("large", "unrounded", 1.01, bytes=2e8))
    assert not stopper("", report("as small", "unrounded", 1.01, bytes=1e8))


def test_in_a_drawn_search_only_the_same_rounding_is_compared() -> None:
    stopper = DominanceStopper(job("joint", "algorithm={kind: optuna}"))
    assert not stopper("", report("a", "unrounded", 1.0, rounding="8"))
    assert not stopper("", report("b", "unrounded", 2.0, rounding="4")), "the better one may never be drawn with 4 bits"
    assert stopper("", report("c", "unrounded", 2.0, rounding="8"))


def test_what_is_rounded_to_nearest_is_compared_with_the_same_rounding_alone() -> None:
    stopper = DominanceStopper(job())
    assert not stopper("", report("a", TO_NEAREST, 1.0, rounding="8"))
    assert not stopper("", report("b", TO_NEAREST, 1.2, rounding="4")), "it will be smaller"
    assert stopper("", report("c", TO_NEAREST, 1.3, rounding="4")) and "b was ahead at rounded to nearest" in stopper.reasons["c"]


def test_a_slow_rounding_has_a_quick_one_before_it() -> None:
    slow = Quantize(scheme=WeightOnly(algorithm="gptq", group_size=64), keep=("down_proj",))
    assert slow.to_nearest == Quantize(scheme=WeightOnly(algorithm="rtn", group_size=64), keep=("down_proj",))
    assert Quantize(scheme=WeightOnly()).to_nearest is None
    assert Quantize(scheme=Mixed(max_bytes_ratio=0.5, algorithm="gptq")).to_nearest is None


def test_a_lock_is_its_holders_alone(tmp_path: Path) -> None:
    first, second = StepLock(tmp_path / "step"), StepLock(tmp_path / "step")
    assert first.try_acquire() and not second.try_acquire()
    first.release()
    assert second.try_acquire()
