"""The run's curves in TensorBoard, and trackers that are not there or that fail."""

import json
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.on_ray.train.metrics_log import MetricsLog
from adaptfleet.on_ray.train.tracking import check_trackers, flat, open_trackers


def job(tracking: str = "{}") -> FinetuneJob:
    return parse_contract(FinetuneJob, f"tracking: {tracking}\npublish: {{name: x}}\n")


def test_tensorboard_has_what_the_lines_have_and_a_resumed_run_drops_what_comes_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, open_trackers(job(), tmp_path, 0))
    for step in (1, 2, 3):
        log.write("train", step, {"loss": float(step)})
    log.close()
    resumed = MetricsLog(tmp_path, 2, open_trackers(job(), tmp_path, 2))
    resumed.write("train", 3, {"loss": 30.0})
    resumed.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    told = [(event.step, event.value) for event in board.Scalars("train/loss")]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_may_be_left_out(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0, open_trackers(job("{tensorboard: false}"), tmp_path, 0)).write("train", 1, {"loss": 1.0})
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_installed_is_told_with_how_to_install_it() -> None:
    check_trackers(job())
    with pytest.raises(ContractError) as told:
        check_trackers(job("{mlflow: {uri: 'http://localhost:1'}, wandb: {project: p}}"))
    assert "pip install mlflow-skinny" in str(told.value) and "pip install wandb" in str(told.value)


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        calls = 0

        def write(self, kind: str, step: int, values: dict[str, float]) -> None:
            self.calls += 1
            raise ConnectionError("the server is gone")

        def close(self) -> None:
            raise AssertionError("it was left out")

    failing = Failing()
    log = MetricsLog(tmp_path, 0, [failing])
    with caplog.at_level(logging.WARNING):
        log.write("train", 1, {"loss": 1.0})
        log.write("train", 2, {"loss": 2.0})
        log.close()
    assert failing.calls == 1 and caplog.text.count("Failing took no more numbers") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_contracts_keys_as_parameters() -> None:
    parameters = dict(flat(job().model_dump(mode="json")))
    assert parameters["train.learning_rate"] == "0.0005" and parameters["method.targets"] == '["all-linear"]'
    assert parameters["publish.name"] == "x" and parameters["tracking.mlflow"] == "null"
