"""Overlays built once, and KubeRay's CRDs. Without the CRDs these tests are not collected, and a line says how to get them; CI has them."""

import os
import shutil
from typing import Any

import pytest

from k8s.validation import crds, manifests

if crds.folder() is None and os.environ.get("CI") != "true":
    collect_ignore = ["test_overlays.py", "test_mistakes.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if crds.folder() is None:
        terminalreporter.write_line(f"tests/manifests: not run without KubeRay's CRDs ({crds.VERSION}). Fetch them: {crds.HOW_TO_FETCH}")
    if shutil.which("promtool") is None:
        terminalreporter.write_line("tests/manifests: alerts are not run without promtool (Debian, Ubuntu: apt install prometheus)")


@pytest.fixture(scope="session")
def kuberay() -> crds.Crds:
    place = crds.folder()
    assert place is not None, f"CI is true, and KubeRay's CRDs are not at hand. Fetch them: {crds.HOW_TO_FETCH}"
    return crds.Crds(place)


@pytest.fixture(scope="session")
def built() -> dict[str, list[manifests.Document]]:
    """Each overlay by its path below k8s/overlays."""
    return {str(folder.relative_to(manifests.OVERLAYS)): manifests.build(folder) for folder in manifests.overlays()}
