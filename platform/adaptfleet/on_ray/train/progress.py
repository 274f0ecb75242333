"""Progress of a run, told by the job: a bar in a terminal, a line every few seconds in a log."""

import sys
import threading
import time
from typing import Any

from adaptfleet.on_ray.train.run_folder import RunFolder

LOG_INTERVAL_S = 10.0
BAR_WIDTH = 24


class ProgressTeller:
    """Follows `progress.json` while the block runs."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._in_terminal = sys.stdout.isatty()

    def __enter__(self) -> "ProgressTeller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        told, told_at, settings = "", 0.0, ""
        done = False
        while not done:
            done = self._done.wait(0.5)
            progress = self._folder.read_json("progress.json")
            if progress is None:
                continue
            if progress.get("settings") not in (None, "", settings):  # at the start, and where other workers go on
                settings = progress["settings"]
                sys.stdout.write(f"\r\x1b[K{settings}\n" if self._in_terminal else f"{settings}\n")
            line = progress_line(progress)
            phase_changed = line.partition(" step ")[0] != told.partition(" step ")[0]
            if line != told and (self._in_terminal or phase_changed or time.monotonic() - told_at >= LOG_INTERVAL_S):
                sys.stdout.write(f"\r\x1b[K{line}" if self._in_terminal else f"{line}\n")
                sys.stdout.flush()
                told, told_at = line, time.monotonic()
        if self._in_terminal and told:
            sys.stdout.write("\n")


def progress_line(progress: dict[str, Any]) -> str:
    """Such as `training step 40/240 [####--------] loss 0.532, 410 tokens/s, 6:40 left`."""
    step, num_steps = progress["step"], progress["num_steps"]
    filled = BAR_WIDTH * step // num_steps
    line = f"{progress['phase']} step {step}/{num_steps} [{'#' * filled}{'-' * (BAR_WIDTH - filled)}]"
    if "loss" in progress:
        minutes, seconds = divmod(round(progress["seconds_left"]), 60)
        line += f" loss {progress['loss']:.3f}, {progress['tokens_per_s']:.0f} tokens/s, {minutes}:{seconds:02} left"
    return line
