"""Jobs' entrypoints: the program is there, and takes what it is given (`--dry-run`)."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from k8s.validation.manifests import ROOT, Document, Finding, name_of
from k8s.validation.operator_rules import ray_job

_SHELL = set(";|&<>`$")


def findings(document: Document) -> Iterator[Finding]:
    found = ray_job(document)
    if found is None:
        return
    path, spec = found
    entrypoint = str(spec.get("entrypoint", ""))
    problem = _problem(entrypoint)
    if problem:
        yield Finding(f"{name_of(document)} {path}.entrypoint", problem)


def contract(entrypoint: str) -> dict[str, Any]:
    """The resolved contract of an entrypoint that is known to be right."""
    import json

    made: dict[str, Any] = json.loads(_dry_run(entrypoint).stdout)
    return made


def _problem(entrypoint: str) -> str | None:
    if set(entrypoint) & _SHELL:
        return f"{entrypoint!r} is more than one command; it cannot be tried out, and hides the job's exit status"
    try:
        words = shlex.split(entrypoint)
    except ValueError as error:
        return f"{entrypoint!r} is no command line: {error}"
    if len(words) < 2 or words[0] != "python" or not words[1].startswith("jobs/"):
        return f"{entrypoint!r} is not `python jobs/PROGRAM.py ...`, which is what the image holds"
    if not (ROOT / words[1]).is_file():
        programs = ", ".join(sorted(f"jobs/{file.name}" for file in (ROOT / "jobs").glob("*.py")))
        return f"there is no {words[1]}; there are {programs}"
    done = _dry_run(entrypoint)
    return done.stderr.strip()[-1500:] or f"exit status {done.returncode}" if done.returncode else None


@cache
def _dry_run(entrypoint: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *shlex.split(entrypoint)[1:], "--dry-run"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"})
