"""A sweep in TensorBoard and MLflow: each trial a run of its own, with its point as hyper-parameters, its losses as it goes on and its
metrics at the end."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from adaptfleet.contracts.search import Point, SweepJob
from adaptfleet.contracts.search_points import trial_name
from adaptfleet.contracts.tracking import MlflowSpec
from adaptfleet.on_ray.train.tracking import Mlflow, flat
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder

log = logging.getLogger(__name__)
_CURVES = ("eval_loss", "nll")
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class TrialTracker(Protocol):
    def write(self, trial: str, point: Point, step: int, values: dict[str, float]) -> None:
        """What a trial told on its way."""

    def end(self, record: Record) -> None: ...

    def close(self) -> None:
        """The search is over."""


class SweepTracking(tune.Callback):
    """Told of by Tune, after the records are written. A tracker that fails is left out from then on, with a warning: the search goes on."""

    def __init__(self, sweep: SweepJob, folder: SweepFolder) -> None:
        self._folder = folder
        self._trackers: list[TrialTracker] = []
        if sweep.tracking.tensorboard:
            self._trackers.append(TrialBoards(folder.path / "tensorboard"))
        if sweep.tracking.mlflow is not None:
            self._trackers.append(TrialRuns(sweep.tracking.mlflow, sweep, folder.path))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it was given; files and connections are not among it."""
        return {**self.__dict__, "_trackers": []}

    def __enter__(self) -> "SweepTracking":
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(lambda tracker: tracker.close())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        values = {name: float(result[name]) for name in _CURVES if isinstance(result.get(name), int | float)}
        if values and result.get("stage") != "finished":
            step = int(result.get("step") or result.get("evaluation") or result.get("training_iteration") or 0)
            self._tell(lambda tracker: tracker.write(trial_name(trial.config), trial.config["point"], step, values))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._folder.records().get(trial_name(trial.config))
        if record is not None:  # else it was cut short by the time of the budget
            self._tell(lambda tracker: tracker.end(record))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)

    def _tell(self, call: Callable[[TrialTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception:
                log.warning("%s is left out from now on", type(tracker).__name__, exc_info=True)
                self._trackers.remove(tracker)


class TrialBoards:
    """TensorBoard's event files, a folder a trial: `tensorboard --logdir` on all of them compares curves and hyper-parameters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._boards: dict[str, SummaryWriter] = {}

    def write(self, trial: str, point: Point, step: int, values: dict[str, float]) -> None:
        board = self._board(trial, step)
        for name, value in values.items():
            board.add_scalar(f"search/{name}", value, step)
        board.flush()

    def end(self, record: Record) -> None:
        board = self._board(record.point_id, None)
        parameters = {axis: "none" if label is None else label for axis, label in record.point.items()}
        results = {f"result/{name}": value for name, value in record.metrics.items()}
        for summary in hparams({**parameters, "status": record.status}, results):
            assert board.file_writer is not None
            board.file_writer.add_summary(summary)
        for name, value in results.items():
            board.add_scalar(name, value)
        self._boards.pop(record.point_id).close()

    def close(self) -> None:
        for board in self._boards.values():
            board.close()

    def _board(self, trial: str, step: int | None) -> SummaryWriter:
        """`step`: the first that is written now; an interrupted trial tells what comes after it again."""
        if trial not in self._boards:
            self._boards[trial] = SummaryWriter(str(self._folder / trial), purge_step=step)
        return self._boards[trial]


class TrialRuns:
    """A run of an MLflow experiment for the sweep, and one under it for each trial. Those of an interrupted sweep go on."""

    def __init__(self, spec: MlflowSpec, sweep: SweepJob, folder: Path) -> None:
        self._spec, self._folder = spec, folder / "mlflow"
        self._folder.mkdir(exist_ok=True)
        told = sweep.model_dump(mode="json", include={"name", "over", "algorithm"}) | {"space": {"job": sweep.space.job}}
        self._whole = Mlflow(spec, folder / "mlflow.json", sweep.run_name(), {"adaptfleet.sweep": sweep.name}, flat(told))
        self._runs: dict[str, Mlflow] = {}

    def write(self, trial: str, point: Point, step: int, values: dict[str, float]) -> None:
        self._run(trial, point).write("search", step, values)

    def end(self, record: Record) -> None:
        run = self._run(record.point_id, record.point)
        run.write("result", 0, record.metrics)
        run.close(_MLFLOW_STATUS[record.status])
        self._runs.pop(record.point_id)

    def close(self) -> None:
        self._whole.close()

    def _run(self, trial: str, point: Point) -> Mlflow:
        if trial not in self._runs:
            # settings of a population's member change: MLflow keeps the first ones
            self._runs[trial] = Mlflow(self._spec, self._folder / f"{trial}.json", trial, {}, flat(dict(point)), self._whole.run_id)
        return self._runs[trial]
