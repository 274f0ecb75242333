"""The sweep as it runs: a table that moves in a terminal, a line for each point that ends in a log."""

import math
import shutil
import sys
import time
from typing import Any

from ray import tune
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adaptfleet.contracts.search import SweepJob
from adaptfleet.contracts.search_points import trial_name
from adaptfleet.core.search.front import front
from adaptfleet.on_ray.tune.stopping import DominanceStopper
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder

_TICK_S = 5.0
_MAX_ROWS = 30


class SweepProgress(tune.Callback):
    """Told of by Tune. What Tune ended early is recorded here, for its trial cannot."""

    def __init__(
        self, sweep: SweepJob, folder: SweepFolder, stopper: DominanceStopper, attempt: int, total: int | None, seconds: float | None
    ) -> None:
        """`seconds`: after which Tune ends whatever runs."""
        self._end = time.monotonic() + seconds if seconds is not None else None
        self._sweep, self._folder, self._stopper, self._attempt, self._total = sweep, folder, stopper, attempt, total
        self._live: dict[str, str] = {}
        self._ticked = 0.0
        self._table = Live(transient=False, auto_refresh=False) if sys.stdout.isatty() else None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it was given; a terminal is not among it."""
        return {**self.__dict__, "_table": None}

    def __enter__(self) -> "SweepProgress":
        if self._table:
            self._table.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self._table:
            self._table.stop()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._ticked > _TICK_S:
            self._ticked = time.monotonic()
            self._folder.tick()
            self._show()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._live[_name(trial)] = "begun"
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._live[_name(trial)] = str(result.get("stage", ""))
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial, "stopped", self._stopper.reasons.get(_name(trial), "the early stopping rule ended it"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial, "failed", "the process of the trial ended, again and again")

    def _ended(self, trial: Any, status: Any, reason: str) -> None:
        name = _name(trial)
        self._live.pop(name, None)
        records = self._folder.records()
        # a record of an earlier beginning is of a failure that was tried again
        if name not in records or records[name].attempt != self._attempt:
            if self._end is not None and time.monotonic() >= self._end and name not in self._stopper.reasons:
                return  # it ran when time was up; with more time it goes on
            last = trial.last_result or {}
            known = {key: float(last[key]) for key in ("nll", "bytes", "eval_loss") if isinstance(last.get(key), int | float)}
            self._folder.record(
                Record(name, trial.config["point"], status, known, reason, [], self._attempt, time.time(), self._folder.search_s())
            )
            records = self._folder.records()
        trim(self._sweep, self._folder)
        if not self._table:
            sys.stdout.write(f"[{len(records)}{f'/{self._total}' if self._total else ''}] {line(self._sweep, records[name])}\n")
            sys.stdout.flush()
        self._show()

    def _show(self) -> None:
        if not self._table:
            return
        goals = [objective.metric for objective in self._sweep.space.objectives]
        table = Table("point", "stage", *goals, title=f"sweep {self._sweep.name}", header_style="bold")
        records = list(self._folder.records().values())
        for record in records[-_MAX_ROWS:]:
            cells = [f"{record.metrics[goal]:.5g}" if goal in record.metrics else "" for goal in goals]
            table.add_row(Text(record.point_id), Text(record.status), *(Text(cell) for cell in cells))
        for name, stage in self._live.items():
            table.add_row(Text(name), Text(stage, style="bold"), *("" for _ in goals))
        of = f" of {self._total}" if self._total else ""
        foot = Text(f"{len(records)}{of} points, {self._folder.search_s():.0f} s, {total_cpu_s(self._folder):.0f} CPU seconds in steps")
        self._table.update(Group(table, foot), refresh=True)


def trim(sweep: SweepJob, folder: SweepFolder) -> None:
    """Removes the rounded checkpoints of finished points that others have beaten: no other point begins with one. Their numbers stay."""
    finished = [record for record in folder.records().values() if record.status == "finished"]
    best = {finished[i].point_id for i in front([objectives(sweep, record.metrics) for record in finished])}
    for record in finished:
        rounded = [name for name in record.steps if name.startswith("quantize-")]
        if rounded and record.point_id not in best:
            shutil.rmtree(folder.steps / rounded[0], ignore_errors=True)


def objectives(sweep: SweepJob, metrics: dict[str, float]) -> tuple[float, ...]:
    """All to be minimised; a metric that is missing is the worst."""
    return tuple(metrics.get(o.metric, math.inf) * (1 if o.goal == "min" else -1) for o in sweep.space.objectives)


def line(sweep: SweepJob, record: Record) -> str:
    """Such as `rank8-ratio0.1-bits4: finished, nll 0.213, bytes 1.16e+08`."""
    values = [f"{o.metric} {record.metrics[o.metric]:.4g}" for o in sweep.space.objectives if o.metric in record.metrics]
    reason = f" ({record.reason.splitlines()[0][:200]})" if record.reason else ""
    return ", ".join([f"{record.point_id}: {record.status}", *values]) + reason


def total_cpu_s(folder: SweepFolder) -> float:
    return sum(cost.cpu_s for cost in folder.costs().values())


def _name(trial: Any) -> str:
    return trial_name(trial.config)
