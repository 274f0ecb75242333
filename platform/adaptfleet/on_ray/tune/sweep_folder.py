"""The folder of a sweep: what it knows of its trials, and what trials share. Everything in it is whole or not there.

contract.json      the resolved contract
trials/POINT.json  what came of each point that was finished, stopped or failed
history.jsonl      a line for each of these records, the replaced ones too: what was made twice shows here
begun/POINT        a point that was begun; without a record in trials/ it was interrupted
costs/STEP.json    what each step cost, and which point made it
steps/STEP/        checkpoints and adapters that points share; those that no point of the front needs are removed at the end
population/        of population-based training: what each member trained, and from whose checkpoint
quality/STEP.json  held-out loss of a checkpoint, measured once
failures/          steps that failed, so that they fail once for all points
finalists/         what the engine made of the points of the front
tune/              Ray Tune's own files
tensorboard/       a folder a trial: its losses as it went on, its point and its metrics
mlflow.json        where MLflow is asked for: the sweep's run; mlflow/ has those of its trials
front.json         the front, the recommended point, all costs
report.html        all of it to look at
front.png          its plot of the front, and over_time.png how the search went
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.search import Point, SweepJob

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Record:
    """What came of a point."""

    point_id: str
    point: Point
    status: Status
    metrics: dict[str, float]
    reason: str = ""
    """Why it stopped or failed."""
    steps: list[str] = field(default_factory=list)
    """What it was made of, by name: shared ones too."""
    attempt: int = 1
    ended_at: float = 0.0
    search_s: float = 0.0
    """Of the search's time, over all its beginnings, when it ended."""


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    wall_s: float
    tokens: int = 0
    """Trained on."""
    by: str = ""
    """The point that made the step."""


class SweepFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, sweep: SweepJob) -> "SweepFolder":
        """Makes the sweep's folder or takes it up again."""
        folder = cls(home() / "runs" / sweep.run_name())
        for name in ("trials", "begun", "costs", "steps", "quality", "finalists", "failures", "locks"):
            (folder.path / name).mkdir(parents=True, exist_ok=True)
        folder.write_json("contract.json", sweep.model_dump(mode="json"))
        return folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """One driver at a time. TrainingError: another process has it."""
        with (self.path / "locks" / "driver").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by its holder's death
            except BlockingIOError:
                raise TrainingError(f"the sweep in {self.path} runs already. Wait for it, or end it.") from None
            yield

    def lock(self, step: str) -> "StepLock":
        return StepLock(self.path / "locks" / step)

    def write_json(self, name: str, value: Any) -> None:
        file = self.path / name
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
        unfinished.replace(file)

    def read_json(self, name: str) -> Any | None:
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def steps(self) -> Path:
        return self.path / "steps"

    def begin(self, point_id: str) -> None:
        (self.path / "begun" / point_id).touch()

    def begun(self) -> set[str]:
        return {file.name for file in (self.path / "begun").iterdir()}

    def record(self, record: Record) -> None:
        self.write_json(f"trials/{record.point_id}.json", asdict(record))
        with (self.path / "history.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"point": record.point_id, "status": record.status, "attempt": record.attempt}) + "\n")

    def records(self) -> dict[str, Record]:
        """In the order in which they ended."""
        found = [Record(**json.loads(file.read_text(encoding="utf-8"))) for file in (self.path / "trials").glob("[!.]*.json")]
        return {record.point_id: record for record in sorted(found, key=lambda record: record.ended_at)}

    def add_cost(self, step: str, cost: Cost) -> None:
        self.write_json(f"costs/{step}.json", asdict(cost))

    def costs(self) -> dict[str, Cost]:
        return {file.stem: Cost(**json.loads(file.read_text(encoding="utf-8"))) for file in (self.path / "costs").glob("[!.]*.json")}

    def search_s(self) -> float:
        """Time of the search by now, over all its beginnings."""
        clock = self.read_json("clock.json") or {"earlier_s": 0.0, "began_at": time.time(), "at": time.time()}
        return float(clock["earlier_s"]) + time.time() - float(clock["began_at"])

    def start_clock(self) -> None:
        """Begins to count again; what the last beginning had taken is known to a few seconds."""
        clock = self.read_json("clock.json")
        earlier = float(clock["earlier_s"]) + float(clock["at"]) - float(clock["began_at"]) if clock else 0.0
        now = time.time()
        self.write_json("clock.json", {"earlier_s": earlier, "began_at": now, "at": now})

    def tick(self) -> None:
        clock = self.read_json("clock.json")
        if clock:
            self.write_json("clock.json", {**clock, "at": time.time()})


class StepLock:
    """Of one step of one sweep. Its holder's death frees it, kill -9 too."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: Any = None

    def try_acquire(self) -> bool:
        handle = self._file.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return False
        self._handle = handle
        return True

    def release(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> "StepLock":
        while not self.try_acquire():
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
