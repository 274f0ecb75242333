"""The processes of one cluster, found by what they inherited and ended by identity, never by name. Linux's /proc."""

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARKER = "ADAPTFLEET_CLUSTER_ID"
"""Environment variable that each process of a cluster inherits."""


@dataclass(frozen=True)
class ProcessId:
    """A process id alone may be given to another process later; with the start time it cannot be mistaken."""

    pid: int
    start_ticks: int
    """Clock ticks from boot to start: field 22 of /proc/PID/stat."""

    @classmethod
    def of(cls, pid: int) -> "ProcessId | None":
        """None: no such process, or it has ended and waits for its parent."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, fields.start_ticks)

    def is_alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def send(self, signum: int) -> None:
        """Nothing happens to a process that has ended, nor to another that has its id now."""
        if self.is_alive():
            try:
                os.kill(self.pid, signum)
            except ProcessLookupError:
                return


@dataclass(frozen=True)
class _Stat:
    parent: int
    session: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may hold anything, brackets too.
    state, parent, _, session, *rest = text.rpartition(")")[2].split()
    if state in "ZX":
        return None
    return _Stat(int(parent), int(session), int(rest[15]))


def members(leader: ProcessId | None, marker: str, variable: str = MARKER) -> set[ProcessId]:
    """All living processes of a cluster: the leader's session, those with the marker in their environment, and what descends from either.

    Three signs, because each alone has a gap: jobs get a session of their own, a changed process title may overwrite the environment, and
    an orphan has lost its parent.
    """
    stats = {int(entry.name): found for entry in Path("/proc").iterdir() if entry.name.isdigit() and (found := _stat(int(entry.name)))}
    sign = f"{variable}={marker}".encode()
    inside = {pid for pid in stats if _environment_has(pid, sign)}
    if leader is not None and (leader.pid in inside or leader.is_alive()):
        inside |= {pid for pid, stat in stats.items() if pid == leader.pid or stat.session == leader.pid}
    grown = True
    while grown:
        children = {pid for pid, stat in stats.items() if stat.parent in inside} - inside
        inside |= children
        grown = bool(children)
    inside.discard(os.getpid())
    return {ProcessId(pid, stats[pid].start_ticks) for pid in inside}


def _environment_has(pid: int, entry: bytes) -> bool:
    try:
        return entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # It ended meanwhile, or it is another user's and so none of ours.
        return False


def wait_gone(processes: Iterable[ProcessId], timeout_s: float) -> set[ProcessId]:
    """Those still alive when the time is up."""
    end = time.monotonic() + timeout_s
    alive = {process for process in processes if process.is_alive()}
    while alive and time.monotonic() < end:
        time.sleep(0.1)
        alive = {process for process in alive if process.is_alive()}
    return alive


def end_cluster(leader: ProcessId | None, marker: str, grace_s: float = 20.0, variable: str = MARKER) -> set[ProcessId]:
    """SIGTERM to the leader, which ends its own; then SIGTERM and SIGKILL to what is left. Returns what outlived even that."""
    known = members(leader, marker, variable)
    if leader is not None and leader in known:
        leader.send(signal.SIGTERM)
        wait_gone([leader], grace_s)
    left = {process for process in known | members(None, marker, variable) if process.is_alive()}
    left = wait_gone(left, 3.0)
    for signum, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0), (signal.SIGKILL, 10.0)):
        if not left:
            return left
        for process in left:
            process.send(signum)
        left = wait_gone(left, patience_s) | members(None, marker, variable)
    return left
