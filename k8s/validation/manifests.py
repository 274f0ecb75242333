"""What kustomize builds, and what a document is called in a message."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "k8s" / "overlays"


@dataclass(frozen=True)
class Finding:
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class BuildError(Exception):
    """kustomize refuses the folder, or is not there."""


def overlays() -> list[Path]:
    """Folders below overlays/ that can be applied; components are parts of them."""
    found = []
    for file in sorted(OVERLAYS.rglob("kustomization.yaml")):
        if yaml.safe_load(file.read_text(encoding="utf-8")).get("kind") == "Kustomization":
            found.append(file.parent)
    return found


def build(folder: Path) -> list[Document]:
    done = subprocess.run([_kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{folder}: {done.stderr.strip()}")
    return list(documents(done.stdout))


def documents(text: str) -> Iterator[Document]:
    for document in yaml.load_all(text, yaml.CSafeLoader):
        if document:
            yield document


def name_of(document: Document) -> str:
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def _kubectl() -> str:
    """The machine's own, else the one that set-up puts beside Python."""
    beside = Path(sys.executable).parent / "kubectl"
    found = shutil.which("kubectl") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise BuildError("kubectl is neither on the PATH nor beside Python; run `make setup`, or install kubectl 1.27 or later")
    return found
