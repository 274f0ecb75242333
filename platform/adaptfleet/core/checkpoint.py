"""Checkpoints: safetensors files and `progress.json`, whole or refused. Sharded tensors are written by the workers that hold them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from adaptfleet.contracts.errors import TrainingError


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any], rank: int = 0) -> None:
    """Writes this worker's part. Its `progress.json` (the first worker's) or `part-N.json` comes last and holds the SHA-256 of the part's
    tensors, so that a torn checkpoint is known as such.

    Where tensors are sharded every worker must call it together; else the first one alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    before = set(folder.glob("*.safetensors"))
    dcp.save(
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=is_sharded),
        no_dist=not is_sharded,
    )
    digests = {file.name: _digest(file) for file in sorted(set(folder.glob("*.safetensors")) - before)}
    parts = torch.distributed.get_world_size() if is_sharded else 1
    name = "progress.json" if rank == 0 else f"part-{rank}.json"
    (folder / name).write_text(json.dumps({**progress, "files": digests, "num_parts": parts}))


def read_progress(folder: Path) -> dict[str, Any]:
    """What the run had done. TrainingError for a torn or changed checkpoint: every part is checked."""
    try:
        progress: dict[str, Any] = json.loads((folder / "progress.json").read_text())
        parts = [progress, *(json.loads((folder / f"part-{rank}.json").read_text()) for rank in range(1, progress.pop("num_parts")))]
        files = {name: digest for part in parts for name, digest in part.pop("files").items()}
        if not files:
            raise ValueError("it names no tensors")
        changed = [name for name, digest in files.items() if _digest(folder / name) != digest]
        if changed:
            raise ValueError(f"{', '.join(changed)} is not what progress.json says")
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"the checkpoint {folder} is torn: {error}. Remove it to go on from an earlier one.") from None
    return progress


def read_tensors(folder: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, laid out as those in `like` are, on however many workers it was written: every worker reads what it holds.

    Tensors of the checkpoint that `like` does not name come whole.
    """
    saved = _shapes(folder)
    missing = sorted(set(like) - set(saved))
    if missing:
        raise TrainingError(f"the checkpoint {folder} lacks {', '.join(missing[:5])}: it is of another model or method.")
    tensors = {name: tensor.detach().clone() for name, tensor in like.items()}
    tensors |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved.items() if name not in like}
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not is_sharded)
    return tensors


def _shapes(folder: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    reader = HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata
    return {name: (list(entry.size), entry.properties.dtype) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
