"""Progress of an evaluation: one line that moves in a terminal, a line every few seconds in a log."""

import sys
import time

LOG_INTERVAL_S = 10.0


class ProgressLine:
    """Tells how far one subject is. Called from one thread."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._doing, self._began, self._told_at = "", 0.0, 0.0
        self._in_terminal = sys.stdout.isatty()

    def tell(self, doing: str, done: int, total: int) -> None:
        now = time.monotonic()
        if doing != self._doing:
            self._end_line()
            self._doing, self._began, self._told_at = doing, now, 0.0
        if self._in_terminal or done == total or now - self._told_at >= LOG_INTERVAL_S:
            line = progress_line(self._label, doing, done, total, now - self._began)
            sys.stdout.write(f"\r\x1b[K{line}" if self._in_terminal else f"{line}\n")
            sys.stdout.flush()
            self._told_at = now

    def close(self) -> None:
        self._end_line()
        self._doing = ""

    def _end_line(self) -> None:
        if self._in_terminal and self._doing:
            sys.stdout.write("\n")


def progress_line(label: str, doing: str, done: int, total: int, seconds: float) -> str:
    """Such as `address-json@3: answering 64/150, 3.2 rows/s, 0:27 left`."""
    line = f"{label}: {doing} {done}/{total}"
    if not done or seconds <= 0:
        return line
    minutes, rest = divmod(round((total - done) * seconds / done), 60)
    return f"{line}, {done / seconds:.1f} rows/s" + (f", {minutes}:{rest:02} left" if done < total else "")
