"""A sweep's trials in TensorBoard, and trackers that a sweep does not get."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.search import SweepJob
from adaptfleet.on_ray.train.tracking import check_trackers
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder
from adaptfleet.on_ray.tune.tracking import SweepTracking

POINT: dict[str, Any] = {"rank": None, "ratio": 0.1, "bits": "8"}
NAME = "ranknone-ratio0.1-bits8"


def sweep(*overrides: str) -> SweepJob:
    return parse_contract(SweepJob, "{job: sweep, name: s, space: joint}", overrides)


def board(folder: SweepFolder) -> EventAccumulator:
    found = EventAccumulator(str(folder.path / "tensorboard" / NAME))
    found.Reload()
    return found


def test_a_trial_has_its_point_and_metrics_in_tensorboard_and_tells_nothing_twice(fresh_home: Path) -> None:
    folder, trial = SweepFolder.open(sweep()), SimpleNamespace(config={"point": POINT, "member": None})
    with SweepTracking(sweep(), folder) as interrupted:
        for evaluation in (1, 2):
            interrupted.on_trial_result(0, [], trial, {"stage": "training", "evaluation": evaluation, "eval_loss": 9.0})
    with SweepTracking(sweep(), folder) as tracking:
        for evaluation in (1, 2, 3):
            tracking.on_trial_result(0, [], trial, {"stage": "training", "evaluation": evaluation, "eval_loss": 4.0 - evaluation})
        folder.record(Record(NAME, POINT, "finished", {"nll": 1.5, "bytes": 1e8}))
        tracking.on_trial_complete(0, [], trial)
    found = board(folder)
    assert [(event.step, event.value) for event in found.Scalars("search/eval_loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert found.Scalars("result/nll")[0].value == 1.5
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["ratio"].number_value == 0.1 and session.hparams["rank"].string_value == "none"
    assert session.hparams["status"].string_value == "finished"


def test_tensorboard_may_be_left_out(fresh_home: Path) -> None:
    job = sweep("tracking.tensorboard=false")
    folder = SweepFolder.open(job)
    with SweepTracking(job, folder) as tracking:
        tracking.on_trial_result(0, [], SimpleNamespace(config={"point": POINT}), {"evaluation": 1, "eval_loss": 1.0})
    assert not (folder.path / "tensorboard").exists()


def test_what_a_sweep_is_not_tracked_by_is_told() -> None:
    with pytest.raises(ContractError, match=r"tracking\.wandb is set, but a sweep's trials are shown in tensorboard and mlflow"):
        sweep("tracking.wandb={project: p}")
    with pytest.raises(ContractError, match=r"tracking\.mlflow is set, but mlflow is not installed.*pip install mlflow-skinny"):
        check_trackers(sweep("tracking.mlflow={uri: 'http://localhost:1'}"))


def test_a_tracker_that_fails_does_not_end_the_search(fresh_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, trial = SweepFolder.open(sweep()), SimpleNamespace(config={"point": POINT})
    (folder.path / "tensorboard").write_text("in the way")
    with SweepTracking(sweep(), folder) as tracking:
        for evaluation in (1, 2):
            tracking.on_trial_result(0, [], trial, {"evaluation": evaluation, "eval_loss": 1.0})
    assert caplog.text.count("TrialBoards is left out from now on") == 1
