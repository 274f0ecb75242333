"""Sends a job to a cluster with `ray job submit` and follows its output."""

import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adaptfleet.contracts.errors import TrainingError

NOT_UPLOADED = (".venv", ".git", "build", "__pycache__", ".mypy_cache", ".ruff_cache", "bench/results", "tests")
"""Of the working folder, what no job needs."""

_TAIL_LINES = 30


def ray_command() -> list[str]:
    """Ray's command line, of this very Python."""
    return [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


def submit_job(
    dashboard_url: str,
    argv: Sequence[str],
    working_dir: Path,
    job_env: Mapping[str, str],
    client_env: Mapping[str, str],
    show: Callable[[str], None],
) -> tuple[int, list[str]]:
    """Uploads `working_dir`, runs `argv` in it on the cluster, and gives each line of output to `show`.

    `job_env` is set for the job, `client_env` for the command that submits it. Returns the exit status, 0 when the job succeeded, and the
    last lines.
    """
    runtime_env = {"excludes": list(NOT_UPLOADED), "env_vars": dict(job_env)}
    command = [*ray_command(), "job", "submit", "--address", dashboard_url, "--working-dir", str(working_dir)]
    command += ["--log-style", "record", "--log-color", "false", "--runtime-env-json", json.dumps(runtime_env), "--", *argv]
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=dict(client_env),
    ) as submitted:
        assert submitted.stdout is not None
        try:
            for line in submitted.stdout:
                tail.append(line.rstrip("\n"))
                show(tail[-1])
        except BaseException:
            submitted.terminate()
            raise
    return submitted.returncode, list(tail)


def job_failed(argv: Sequence[str], status: int, tail: Sequence[str]) -> TrainingError:
    shown = "\n".join(f"  {line}" for line in tail)
    return TrainingError(f"the job `{' '.join(argv)}` failed (exit status {status}). Its last lines:\n{shown}")
