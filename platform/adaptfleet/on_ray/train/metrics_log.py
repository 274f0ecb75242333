"""The run's curves: JSON lines always, and the trackers of the contract."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from adaptfleet.on_ray.train.tracking import Tracker

_TORN = 2**62
_TIMES = ("at", "stopped_at")
log = logging.getLogger(__name__)


class MetricsLog:
    """Appends to `metrics.jsonl` and hands the same to the trackers. A resumed run drops what lies after its checkpoint: these steps come
    again.

    A tracker that fails is left out from then on, with a warning: training goes on, and `metrics.jsonl` holds everything.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence[Tracker]) -> None:
        self._file = folder / "metrics.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        # beginnings are kept: they tell how often the run was disturbed and what that cost
        kept = [line for line in lines if _step(line) <= step or '"kind": "start"' in line]
        self.num_redone = len({_step(line) for line in lines} - {_step(line) for line in kept} - {_TORN})
        """Steps that had been made and come again."""
        self.stopped_at = max((_at(line) for line in lines), default=0.0)
        """When the last of them was made, in seconds since 1970; 0: this is the first beginning."""
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in kept))
        unfinished.replace(self._file)
        self._trackers = list(trackers)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        with self._file.open("a") as lines:
            lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        # trackers keep the time themselves
        curves = {key: value for key, value in values.items() if key not in _TIMES}
        for tracker in list(self._trackers) if kind != "start" else ():
            try:
                tracker.write(kind, step, curves)
            except Exception:
                log.warning("%s took no more numbers after step %d and is left out", type(tracker).__name__, step - 1, exc_info=True)
                self._trackers.remove(tracker)

    def close(self) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception:
                log.warning("%s did not end its run", type(tracker).__name__, exc_info=True)


def _at(line: str) -> float:
    try:
        return float(json.loads(line)["at"])
    except (ValueError, KeyError):
        return 0.0


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut off by a kill
        return _TORN
