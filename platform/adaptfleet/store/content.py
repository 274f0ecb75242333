"""The files of an artifact: which may be published, and how they reach the store."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from adaptfleet.contracts.artifacts import Draft, FileEntry
from adaptfleet.contracts.errors import PublishError
from adaptfleet.store.adapter_check import WEIGHTS, adapter_offenders
from adaptfleet.store.objects import CHUNK_BYTES, Objects
from adaptfleet.store.records import content_prefix
from adaptfleet.store.safetensors_header import read_header

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._+=@,()\[\] -]{1,200}")
ABANDONED_AFTER = timedelta(days=7)
"""An upload that no version claims and that nothing was added to for so long is a killed publisher's."""


def is_safe_path(path: str) -> bool:
    """True for a relative path of plain parts: no `..`, no leading slash, nothing that a store or a shell reads otherwise."""
    return len(path) <= 500 and all(_PART.fullmatch(part) and part == part.strip() for part in path.split("/"))


def publishable_files(draft: Draft, folder: Path) -> list[str]:
    """Relative paths of the files to publish, sorted. PublishError lists all that forbids it."""
    if not folder.is_dir():
        raise PublishError(f"cannot publish {folder}: it is no folder. Give the folder that holds the {draft.kind}'s files.")
    try:
        paths, offenders = _walk(folder)
        offenders += [
            f"{path}: may hold pickled Python, which runs code when loaded; save it as .safetensors or remove it"
            for path in paths
            if path.lower().endswith(PICKLES)
        ]
        if draft.serves_adapters_of is not None and draft.kind != "model":
            offenders.append(
                f"serves_adapters_of is given, but this is of the kind {draft.kind}: only a model serves adapters; leave it out"
            )
        if draft.kind == "adapter":
            offenders += adapter_offenders(draft, folder)
        elif draft.kind == "model":
            offenders += _model_offenders(folder, paths)
        elif not any(path.endswith((".jsonl", ".parquet")) for path in paths):
            offenders.append("no .jsonl or .parquet file: a data set's rows are in one of these")
    except OSError as error:
        raise PublishError(f"cannot publish {folder}: cannot read {error.filename}: {error.strerror}.") from None
    if offenders:
        count = "1 thing forbids" if len(offenders) == 1 else f"{len(offenders)} things forbid"
        raise PublishError(f"{folder} is not published as {draft.name}: {count} it.\n" + "\n".join(f"  - {line}" for line in offenders))
    return paths


def upload(objects: Objects, name: str, upload_id: str, folder: Path, paths: list[str]) -> dict[str, FileEntry]:
    """Writes the files under the upload's own prefix. The hash is of the very bytes that were sent, also when a file changes meanwhile."""
    entries: dict[str, FileEntry] = {}
    for path in paths:
        key = f"{content_prefix(name, upload_id)}/{path}"
        pieces = _HashedPieces(folder / path)
        try:
            num_bytes = (folder / path).stat().st_size
            if num_bytes < CHUNK_BYTES:
                objects.put(key, b"".join(pieces))
            else:
                objects.put_stream(key, pieces, num_bytes)
        except OSError as error:
            raise PublishError(f"cannot publish {folder}: cannot read {path}: {error.strerror}.") from None
        entries[path] = pieces.entry()
    return entries


class _HashedPieces:
    """A file's bytes in pieces, hashed as they pass. Iterated once."""

    def __init__(self, file: Path):
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        with self._file.open("rb") as stream:
            while piece := stream.read(CHUNK_BYTES):
                self._digest.update(piece)
                self._num_bytes += len(piece)
                yield piece

    def entry(self) -> FileEntry:
        return FileEntry(sha256=self._digest.hexdigest(), num_bytes=self._num_bytes)


def discard(objects: Objects, name: str, upload_id: str) -> None:
    """Deletes an upload's files."""
    objects.delete_folder(content_prefix(name, upload_id))


def discard_abandoned(objects: Objects, name: str, claimed: set[str]) -> None:
    """Deletes what killed publishers of this name left behind."""
    for upload_id, modified_at in objects.folder_ages(content_prefix(name)).items():
        if upload_id not in claimed and datetime.now(UTC) - modified_at > ABANDONED_AFTER:
            discard(objects, name, upload_id)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """All regular files, and an offender for each link, special file and unsafe name. Links are not followed."""
    paths: list[str] = []
    offenders: list[str] = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        for entry in sorted([*folders, *files]):
            file = Path(root) / entry
            path = file.relative_to(folder).as_posix()
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                offenders.append(f"{path!r}: is a link; put a copy of the file in its place")
            elif not is_safe_path(path):
                offenders.append(f"{path!r}: names of files have letters, digits and . _ + = @ , ( ) [ ] - and inner blanks; rename it")
            elif stat.S_ISREG(mode):
                paths.append(path)
            elif not stat.S_ISDIR(mode):
                offenders.append(f"{path!r}: is neither a file nor a folder; remove it")
    if not paths and not offenders:
        offenders.append("the folder is empty")
    return sorted(paths), offenders


def _raise(error: OSError) -> None:
    raise error


def _model_offenders(folder: Path, paths: list[str]) -> Iterator[str]:
    """What a checkpoint in Hugging Face's format must have: a config, and whole weights."""
    if "config.json" not in paths:
        yield "config.json is missing: save the model with save_pretrained"
    shards = [path for path in paths if path.endswith(".safetensors") and path != WEIGHTS]
    if not shards:
        yield "no .safetensors file holds the weights: save the model with save_pretrained"
    for shard in shards:
        try:
            read_header(folder / shard)
        except ValueError as error:
            yield f"{shard}: {error}; save the model again"
    if "model.safetensors.index.json" in paths:
        try:
            named = set(json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"model.safetensors.index.json is no index of shards: {error!r}"
        else:
            for shard in sorted(named - set(paths)):
                yield f"{shard} is missing: model.safetensors.index.json names it"
