"""The run's curves: JSON lines and TensorBoard."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/`. A resumed run drops what lies after its checkpoint: these steps come again."""

    def __init__(self, folder: Path, step: int) -> None:
        self._file = folder / "metrics.jsonl"
        kept = [line for line in self._file.read_text().splitlines() if _step(line) <= step] if self._file.exists() else []
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in kept))
        unfinished.replace(self._file)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        with self._file.open("a") as lines:
            lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self._board.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut off by a kill
        return 2**62
