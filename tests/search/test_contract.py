"""Spaces: what they may say, what is refused, and the jobs that their points stand for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.search import SPACES, SweepJob
from adaptfleet.contracts.search_points import grid, job_of, normalised, point_id

JOINT: dict[str, Any] = yaml.safe_load((SPACES / "joint.yaml").read_text())


def sweep(*overrides: str, **space: Any) -> SweepJob:
    return parse_contract(SweepJob, yaml.safe_dump({"job": "sweep", "name": "s", "space": {**JOINT, **space}}, sort_keys=False), overrides)


def refused(*overrides: str, **space: Any) -> str:
    with pytest.raises(ContractError) as caught:
        sweep(*overrides, **space)
    return str(caught.value)


@pytest.mark.parametrize("file", sorted(SPACES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_space_is_one(file: Path) -> None:
    kind = {"learning_rate": "random", "learning_rate_population": "population"}.get(file.stem, "grid")
    job = parse_contract(SweepJob, f"{{job: sweep, name: s, space: {file.stem}, algorithm: {{kind: {kind}}}}}")
    assert job.space.job in ("compress", "finetune", "distill", "serve")
    assert job_of(job, normalised(job.space, job.space.baseline))


def test_the_joint_space_has_27_points_and_leaving_it_alone_is_one() -> None:
    job = sweep()
    points = grid(job.space)
    assert len(points) == 27 == len({point_id(point) for point in points})
    baseline = job_of(job, job.space.baseline)
    assert isinstance(baseline, CompressJob)
    assert [step.kind for step in baseline.steps] == ["prune"] and baseline.steps[0].mlp_width == 0.0  # type: ignore[union-attr]
    whole = job_of(job, {"rank": 32, "ratio": 0.2, "bits": "4"})
    assert [step.kind for step in whole.steps] == ["prune", "recover", "merge", "quantize"]  # type: ignore[attr-defined]
    assert whole.step(type(whole.steps[1])).method.rank == 32  # type: ignore[attr-defined]
    # what costs most changes fastest, so that a training is over before the points that share it are rounded
    assert [point["bits"] for point in points[:9]] == ["16"] * 9 and len({point["rank"] for point in points[:3]}) == 3


def test_equal_points_are_equal_jobs_and_ids_are_safe() -> None:
    job = parse_contract(SweepJob, "{job: sweep, name: s, space: prune_then_quantize}")
    points = grid(job.space)
    # importance does not apply where nothing is pruned: 5 roundings once, not three times
    assert len(points) == 5 + 3 * 3 * 5
    assert len({job_of(job, point).fingerprint() for point in points}) == len(points)
    assert all(set(point_id(point)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._+") for point in points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": [{"metric": "nl"}]}, "names 'nl', which a trial of compress does not measure. Did you mean 'nll'?"),
        ({"constraints": [{"metric": "bytes"}]}, "give one of at_most and at_least for bytes"),
        ({"baseline": {"rank": None, "ratio": 0.05, "bits": "16"}}, "baseline has ratio 0.05, which the axis does not"),
        ({"baseline": {"rank": None, "bits": "16"}}, "baseline gives no value of the axis 'ratio'"),
        ({"early_stopping": {"kind": "asha"}}, "ranks by one objective, but there are 2; use dominance"),
        ({"early_stopping": {"kind": "asah"}}, "'asah' is not known. Did you mean 'asha'?"),
    ],
)
def test_what_a_space_must_not_say(change: dict[str, Any], message: str) -> None:
    assert message in refused(**change)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"path": "steps.prune.mlp_widht", "values": [0.0]}, "'mlp_widht' is no key of steps.prune. Did you mean 'mlp_width'?"),
        ({"path": "steps.prun.mlp_width", "values": [0.0]}, "'prun' is none of steps. Did you mean 'prune'?"),
        ({"path": "model.source.name", "values": [0.0]}, "model.source is 'smollm2-135m' in the base, which has no keys"),
        (
            {"path": "steps.prune.mlp_width", "values": [0.0, 1.5]},
            "ranknone-ratio1.5-bits16: steps.0.mlp_width: Input should be less than 1",
        ),
        ({"path": "steps.prune.mlp_width", "values": [0.0, None]}, "it has a null value, so write in `without` which paths"),
        ({"path": "steps.prune.mlp_width", "values": [0.0], "when": {"bit": ["8"]}}, "names 'bit', no other axis. Did you mean 'bits'?"),
        ({"path": "steps.prune.mlp_width", "values": [0.0], "when": {"bits": ["9"]}, "without": ["steps.prune"]}, "bits is never '9'"),
    ],
)
def test_an_axis_is_a_path_into_the_jobs_contract(axis: dict[str, Any], message: str) -> None:
    assert message in refused(axes={**JOINT["axes"], "ratio": axis})


def test_what_is_laid_over_the_base_is_checked_too() -> None:
    job = sweep("over.steps.recover.train.max_steps=3", "over.model.source=other")
    trial = job_of(job, {"rank": 8, "ratio": 0.0, "bits": "16"})
    assert isinstance(trial, CompressJob) and trial.model.source == "other" and trial.steps[1].train.max_steps == 3  # type: ignore[union-attr]
    assert "max_step: unknown key. Did you mean 'max_steps'" in refused("over.steps.recover.train.max_step=3")
    assert "over names 'recovr'" in refused("over.steps.recovr.train.max_steps=3")
    published = [*JOINT["base"]["steps"], {"kind": "publish", "name": "x"}]
    assert "the space's base publishes" in refused(base={**JOINT["base"], "steps": published})


def test_a_range_is_for_searches_that_draw() -> None:
    text = "{job: sweep, name: s, space: learning_rate}"
    with pytest.raises(ContractError, match=r"algorithm\.kind is 'grid', but learning_rate is a range"):
        parse_contract(SweepJob, text)
    drawn = parse_contract(SweepJob, text, ["algorithm={kind: optuna}"])
    assert isinstance(job_of(drawn, {"learning_rate": 3e-4, "warmup": 0.2}), FinetuneJob)


def test_an_unknown_space_is_told_with_what_there_is() -> None:
    with pytest.raises(ContractError, match="Did you mean 'joint'") as caught:
        parse_contract(SweepJob, "{job: sweep, name: s, space: joitn}")
    assert "Shipped are distill_alpha, joint" in str(caught.value)


def test_a_larger_budget_goes_on_in_the_same_folder() -> None:
    assert sweep("budget={trials: 3}").run_name() == sweep().run_name() == sweep("finalists.max=1").run_name()
    assert sweep("over.model.source=x").run_name() != sweep().run_name()
    assert len(sweep("name=" + "a" * 64).run_name()) <= 64
