"""A private Ray cluster on this machine: loopback ports of its own, token authentication, a private folder, an end that leaves nothing."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.on_ray.cluster.launch import RAY_FOLDER, client_env, launch, private_folder
from adaptfleet.on_ray.cluster.processes import end_cluster, members
from adaptfleet.on_ray.cluster.record import ClusterRecord, read_record, remove_record, write_record
from adaptfleet.on_ray.cluster.submission import job_failed, submit_job

_ATTEMPTS = 3
"""Ray gives a node 30 s to come up, whatever one asks for; on a busy machine the second try finds everything in the page cache."""


class LocalCluster:
    """A running cluster. `with LocalCluster.start() as cluster:` stops it at the end of the block."""

    def __init__(self, record: ClusterRecord, record_file: Path | None = None, logs_to: Path | None = None) -> None:
        self._record = record
        self._record_file = record_file
        self._logs_to = logs_to
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        num_cpus: int | None = None,
        folder: Path | None = None,
        *,
        detached: bool = False,
        record_file: Path | None = None,
        logs_to: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "LocalCluster":
        """Starts a head node and waits for it.

        num_cpus     what the cluster may hand out; None: this machine's cores
        folder       Ray's private folder, which must not exist and have a short path; None: a new one in the temporary folder
        detached     it outlives this process; else it ends with it, and must be started from the main thread
        record_file  where it is written down for other processes
        logs_to      Ray's logs are kept there when it stops
        env          variables for all processes of the cluster

        AdaptfleetError: Ray did not start, with the end of what it said.
        """
        said = ""
        for _ in range(_ATTEMPTS):
            place = private_folder(folder)
            marker = secrets.token_hex(16)
            record, process, said = launch(place, marker, num_cpus or len(os.sched_getaffinity(0)), detached, env or {})
            if record is not None:
                cluster = cls(record, record_file, logs_to)
                cluster._process = process
                if record_file is not None:
                    write_record(record, record_file)
                return cluster
            shutil.rmtree(place, ignore_errors=True)
        raise AdaptfleetError(f"Ray did not start, in {_ATTEMPTS} tries. The end of what it said:\n{said}")

    @classmethod
    def attach(cls, record_file: Path, logs_to: Path | None = None) -> "LocalCluster | None":
        """The cluster another process wrote down, if it still runs."""
        record = read_record(record_file)
        if record is None or not record.leader.is_alive():
            return None
        return cls(record, record_file, logs_to)

    @classmethod
    def clear(cls, record_file: Path, logs_to: Path | None = None) -> bool:
        """Ends what is left of the cluster that another process wrote down. True: there was something to end."""
        record = read_record(record_file)
        if record is None:
            return False
        found = bool(members(record.leader if record.leader.is_alive() else None, record.marker))
        cls(record, record_file, logs_to).stop()
        return found

    @property
    def address(self) -> str:
        """Host and port for `ray.init`."""
        return self._record.address

    @property
    def dashboard_url(self) -> str:
        """The dashboard and the job server; it wants the token."""
        return self._record.dashboard_url

    @property
    def num_cpus(self) -> int:
        return self._record.num_cpus

    @property
    def folder(self) -> Path:
        return Path(self._record.folder)

    @property
    def is_owned_by_living(self) -> bool:
        """Another process, still alive, will end this cluster itself."""
        owner = self._record.owner
        return owner is not None and owner.is_alive()

    @property
    def env(self) -> dict[str, str]:
        """To be laid over the environment of processes that use the cluster, Ray's own commands among them."""
        return {**client_env(self.folder), "RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard_url}

    def submit(
        self,
        argv: Sequence[str],
        working_dir: Path,
        env: Mapping[str, str] | None = None,
        show: Callable[[str], None] | None = None,
        check: bool = True,
    ) -> int:
        """Runs `argv` on the cluster by `ray job submit`, its output line by line to `show` (by default standard output).

        Returns the exit status; with `check`, a failed job raises TrainingError with its last lines.
        """
        status, tail = submit_job(self.dashboard_url, argv, working_dir, env or {}, {**os.environ, **self.env}, show or _write_line)
        if status and check:
            raise job_failed(argv, status, tail)
        return status

    def stop(self) -> None:
        """Ends every process of this cluster and no other, and removes its folder. A second call does nothing."""
        self._leave()
        left = end_cluster(self._record.leader, self._record.marker)
        if self._process is not None:
            # It has ended: this takes its exit status, so that it does not stay in the process table.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        if left:
            raise AdaptfleetError(f"processes {', '.join(str(p.pid) for p in left)} of the local cluster could not be ended.")
        if self._logs_to is not None:
            self._keep_logs(self._logs_to)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._record_file is not None:
            remove_record(self._record_file, self._record.marker)

    def _leave(self) -> None:
        """Where this process has joined the cluster: one that is still joined when it ends waits a minute for it and is then aborted by
        Ray, whatever it had to say."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized() and ray.get_runtime_context().gcs_address == self.address:
            ray.shutdown()

    def _keep_logs(self, place: Path) -> None:
        logs = self.folder / RAY_FOLDER / "session_latest" / "logs"
        if logs.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            kept = place / "ray"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(logs, kept, ignore_dangling_symlinks=True)

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
