"""Checkpoints: a folder of `state.safetensors` and `progress.json`, whole or refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adaptfleet.contracts.errors import TrainingError


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
    """Writes both files; `progress.json` comes last and holds the SHA-256 of the tensors, so a torn checkpoint is known as such."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "state.safetensors")
    (folder / "progress.json").write_text(json.dumps({**progress, "sha256": _digest(folder / "state.safetensors")}))


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the progress. TrainingError for a torn or changed checkpoint."""
    try:
        progress = json.loads((folder / "progress.json").read_text())
        if progress.pop("sha256") != _digest(folder / "state.safetensors"):
            raise ValueError("state.safetensors is not what progress.json says")
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"the checkpoint {folder} is torn: {error}. Remove it to go on from an earlier one.") from None
    return load_file(folder / "state.safetensors"), progress


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
