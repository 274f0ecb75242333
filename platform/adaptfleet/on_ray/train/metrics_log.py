"""The run's curves: JSON lines always, and the trackers of the contract."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from adaptfleet.on_ray.train.tracking import Tracker

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends to `metrics.jsonl` and hands the same to the trackers. A resumed run drops what lies after its checkpoint: these steps come
    again.

    A tracker that fails is left out from then on, with a warning: training goes on, and `metrics.jsonl` holds everything.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence[Tracker]) -> None:
        self._file = folder / "metrics.jsonl"
        kept = [line for line in self._file.read_text().splitlines() if _step(line) <= step] if self._file.exists() else []
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in kept))
        unfinished.replace(self._file)
        self._trackers = list(trackers)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        with self._file.open("a") as lines:
            lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for tracker in list(self._trackers):
            try:
                tracker.write(kind, step, values)
            except Exception:
                log.warning("%s took no more numbers after step %d and is left out", type(tracker).__name__, step - 1, exc_info=True)
                self._trackers.remove(tracker)

    def close(self) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception:
                log.warning("%s did not end its run", type(tracker).__name__, exc_info=True)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut off by a kill
        return 2**62
