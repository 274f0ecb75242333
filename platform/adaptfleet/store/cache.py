"""Brings an artifact's files here: a folder per content, every file's SHA-256 checked on every load, whole or absent."""

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path

from adaptfleet.contracts.artifacts import FileEntry, Manifest
from adaptfleet.contracts.errors import CorruptError, StoreError
from adaptfleet.store.content import is_safe_path
from adaptfleet.store.objects import CHUNK_BYTES, Objects
from adaptfleet.store.records import content_prefix

_STALE_S = 24 * 3600.0


def cached_folder(objects: Objects, manifest: Manifest, upload_id: str, cache: Path) -> Path:
    """The local folder with exactly the manifest's files. A folder that differs from its manifest is fetched anew.

    CorruptError names the file of the store that differs; StoreError where the cache cannot be written.
    """
    unsafe = sorted(path for path in manifest.files if not is_safe_path(path))
    if unsafe:
        raise CorruptError(f"{manifest.reference}: its manifest names unsafe paths: {unsafe}. Remove the version and publish it again.")
    final = cache / content_digest(manifest.files)
    if _holds(final, manifest.files):
        return final
    part = cache / f".part-{uuid.uuid4().hex}"
    try:
        part.mkdir(parents=True)
        _remove_stale(cache)
        for path, entry in manifest.files.items():
            _download(objects, manifest, f"{content_prefix(manifest.name, upload_id)}/{path}", path, entry, part / path)
        _put_in_place(part, final)
    except OSError as error:
        raise StoreError(
            f"cannot keep {manifest.reference} in the cache {cache}: {error.strerror}. "
            f"Free space there, or set ADAPTFLEET_HOME to a larger disk."
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def content_digest(files: dict[str, FileEntry]) -> str:
    """Equal for artifacts with equal files, whatever their names and versions."""
    canonical = json.dumps({path: entry.sha256 for path, entry in files.items()}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def _download(objects: Objects, manifest: Manifest, key: str, path: str, entry: FileEntry, target: Path) -> None:
    way_out = f"Publish the artifact again, or restore {objects.url}/{key} from a backup."
    info = objects.info(key)
    if info is None:
        raise CorruptError(f"{manifest.reference}: the file {path} is missing from the store. {way_out}")
    if info.num_bytes != entry.num_bytes:
        raise CorruptError(
            f"{manifest.reference}: the file {path} has {info.num_bytes} bytes in the store, its manifest says {entry.num_bytes}. {way_out}"
        )
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        for piece in objects.read(key, entry.num_bytes):
            digest.update(piece)
            stream.write(piece)
    if digest.hexdigest() != entry.sha256:
        raise CorruptError(
            f"{manifest.reference}: the file {path} has the SHA-256 {digest.hexdigest()} in the store, "
            f"its manifest says {entry.sha256}. {way_out}"
        )


def _holds(folder: Path, files: dict[str, FileEntry]) -> bool:
    """True where the folder has exactly these files, byte for byte."""
    if not folder.is_dir():
        return False
    try:
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
        return present == set(files) and all(_sha256(folder / path) == entry.sha256 for path, entry in files.items())
    except OSError:
        return False  # another process replaced the folder while it was read: fetch anew


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _put_in_place(part: Path, final: Path) -> None:
    """Renames the fetched folder into place. A differing folder there is moved aside first; an equal one by a faster process is kept."""
    for _ in range(10):
        try:
            part.rename(final)
            return
        except OSError:
            if not final.exists():
                raise
        aside = final.with_name(f".part-{uuid.uuid4().hex}")
        try:
            final.rename(aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside, ignore_errors=True)
    raise StoreError(f"{final} is being replaced by other processes again and again. Try again.")


def _remove_stale(cache: Path) -> None:
    """Removes what killed processes left half fetched."""
    for entry in os.scandir(cache):
        if entry.name.startswith(".part-") and time.time() - entry.stat().st_mtime > _STALE_S:
            shutil.rmtree(entry.path, ignore_errors=True)
