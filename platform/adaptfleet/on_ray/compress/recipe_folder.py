"""Where steps leave what they made: each in a folder named after the fingerprint of everything before it, whole or not there."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.home import home

FORMAT = 2
"""Raised when a step comes to make something else of the same contract."""


@dataclass(frozen=True)
class Made:
    """A checkpoint on the way, and the fingerprint of all that made it."""

    folder: Path
    key: str


def next_key(before: str, step: Spec, **inputs: str) -> str:
    """Sixteen hex digits. `inputs`: what the step reads beside the checkpoint, by content hash."""
    state = json.dumps([FORMAT, before, step.model_dump(mode="json"), inputs], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def steps_folder() -> Path:
    return home() / "cache" / "compression"


def made_once(kind: str, key: str, make: Callable[[Path], None], root: Path | None = None) -> Made:
    """The folder of this key. `make` fills a new folder beside it, which takes its name when it is whole: a killed step leaves nothing that
    counts, and what it did leave is removed here. `root`: where the folders stand, if not with those of all recipes."""
    folder = (root or steps_folder()) / f"{kind}-{key}"
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        for left in folder.parent.glob(f".{folder.name}.*"):
            if not _is_alive(left.name.rpartition(".")[2]):
                shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            make(unfinished)
            if not folder.is_dir():
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Made(folder, key)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def write_json(file: Path, value: Any) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
    unfinished.replace(file)
