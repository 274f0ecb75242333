"""Rows become tokens once: token files in the home's cache, by a hash of the rows, the tokenizer and the limits."""

import contextlib
import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.home import home
from adaptfleet.core.data.datasets import DatasetIndex, RowNumbers
from adaptfleet.core.data.encoding import Faults, encode_block
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.files import SPAN_ROWS, Span, read_span
from adaptfleet.core.data.rows import BadRows, examples
from adaptfleet.core.data.scan import Scan, chosen_sha256
from adaptfleet.core.data.tokens import Rows, TokenFile, file_sha256, record_batch, write_tokens

log = logging.getLogger(__name__)
_FORMAT = 2
"""Raised when the same rows give another file than before."""
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*")
_STALE_S = 24 * 3600.0


@dataclass(frozen=True)
class Task:
    """A span whose rows become tokens, apart from all others."""

    span: Span
    chosen: npt.NDArray[np.bool_] | None
    """Which of its rows; None: all."""
    with_file: bool
    """Whether messages name the file."""


@dataclass(frozen=True)
class Encoder:
    """What makes tokens of rows; pickles, so that other processes can do it."""

    tokenizer: Any
    max_tokens: int
    truncate: bool

    def encode(self, task: Task) -> Iterator[tuple[pa.RecordBatch, Faults]]:
        """A span's rows in batches. DataError: the file was changed since it was scanned."""
        bad = BadRows()
        found = _chosen(examples(task.span, read_span(task.span), bad, task.with_file), task.chosen)
        while block := list(islice(found, SPAN_ROWS)):
            encoded = encode_block(block, self.tokenizer, self.max_tokens, self.truncate)
            yield record_batch(encoded.rows), encoded.faults
        if bad.listing.count:
            raise DataError(f"{task.span.file} was changed while it was being read. Run again once nothing writes to it.")


def _chosen(rows: Iterator[Example], chosen: npt.NDArray[np.bool_] | None) -> Iterator[Example]:
    return rows if chosen is None else (row for row, wanted in zip(rows, chosen.tolist(), strict=True) if wanted)


Execute = Callable[[Encoder, Sequence[Task]], Iterator[tuple[pa.RecordBatch, Faults]]]
"""Runs the tasks and gives their results in the tasks' order."""


def one_after_another(encoder: Encoder, tasks: Sequence[Task]) -> Iterator[tuple[pa.RecordBatch, Faults]]:
    for task in tasks:
        yield from encoder.encode(task)


@dataclass(frozen=True)
class TokenisedDataset:
    files: tuple[Path, ...]
    train_parts: tuple[RowNumbers, ...]
    """Where the training rows of each source stand in the files, numbered one file after another, in the seeded order."""
    test: RowNumbers

    @property
    def train(self) -> RowNumbers:
        """The parts one after another."""
        return self.train_parts[0] if len(self.train_parts) == 1 else np.concatenate(self.train_parts)

    def rows(self, numbers: RowNumbers) -> Rows:
        return Rows([TokenFile(file) for file in self.files], numbers)


def tokenise(index: DatasetIndex, encoder: Encoder, tokenizer_sha256: str, execute: Execute = one_after_another) -> TokenisedDataset:
    """The rows of both sides as token files: cached ones, else made by `execute`. DataError lists the faults of all sources."""
    used = np.zeros(int(index.starts[-1]), dtype=np.bool_)
    used[index.train] = True
    used[index.test] = True
    files: list[Path] = []
    errors: list[DataError] = []
    for scan, start in zip(index.scans, index.starts, strict=False):
        chosen = used[start : start + len(scan)]
        if not chosen.any():
            continue
        try:
            files.append(_token_file(scan, chosen, encoder, tokenizer_sha256, execute))
        except DataError as error:
            errors.append(error)
    if errors:
        raise DataError("\n".join(map(str, errors)))
    place = np.cumsum(used, dtype=np.int32)
    place -= 1
    return TokenisedDataset(tuple(files), tuple(place[part] for part in index.train_parts), place[index.test])


def tokenizer_sha256(folder: Path, tokenizer: Any) -> str:
    """Of all that decides which ids a text gets: the tokenizer's files, its chat template, and the libraries' versions."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    digest.update(str(tokenizer.chat_template).encode())
    digest.update(" ".join(metadata.version(library) for library in ("tokenizers", "transformers")).encode())
    return digest.hexdigest()


def _token_file(scan: Scan, chosen: npt.NDArray[np.bool_], encoder: Encoder, tokenizer_sha256: str, execute: Execute) -> Path:
    rows_digest = chosen_sha256(scan.digests_N2, chosen).hex()
    made_of = [_FORMAT, rows_digest, tokenizer_sha256, encoder.max_tokens, encoder.truncate]
    folder = home() / "cache" / "tokens" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    num_rows = int(np.count_nonzero(chosen))
    if _is_whole(folder, num_rows):
        log.info("%s: the tokens of %d rows are in the cache (%s)", scan.source.name, num_rows, folder.name)
        return folder / "tokens.arrow"
    began = time.monotonic()
    part = folder.with_name(f".part-{uuid.uuid4().hex}")
    faults = Faults()
    try:
        part.mkdir(parents=True)
        _remove_stale(folder.parent)

        def batches() -> Iterator[pa.RecordBatch]:
            for batch, batch_faults in execute(encoder, _tasks(scan, chosen)):
                faults.merge(batch_faults)
                yield batch

        found_rows, num_tokens = write_tokens(part / "tokens.arrow", batches())
        error = faults.error(encoder.max_tokens)
        if error:
            raise error
        if found_rows != num_rows:
            raise DataError(f"{scan.source.name} was changed while it was being read. Run again once nothing writes to it.")
        facts = {
            "rows": num_rows,
            "tokens": num_tokens,
            "sha256": file_sha256(part / "tokens.arrow"),
            "rows_sha256": rows_digest,
            "tokenizer_sha256": tokenizer_sha256,
            "max_tokens": encoder.max_tokens,
            "truncate": encoder.truncate,
        }
        (part / "tokens.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _put_in_place(part, folder, num_rows)
    except OSError as error:
        raise DataError(f"cannot write tokens below {folder.parent}: {error.strerror}. Free space there.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log.info("%s: %d rows became %s tokens in %.1f s", scan.source.name, num_rows, f"{num_tokens:,}", time.monotonic() - began)
    return folder / "tokens.arrow"


def _tasks(scan: Scan, chosen: npt.NDArray[np.bool_]) -> list[Task]:
    with_file = len(scan.source.files) > 1
    tasks = []
    for span, start, end in zip(scan.spans, scan.span_starts[:-1], scan.span_starts[1:], strict=True):
        mine = chosen[start:end]
        if mine.any():
            tasks.append(Task(span, None if mine.all() else mine, with_file))
    return tasks


def _is_whole(folder: Path, num_rows: int) -> bool:
    try:
        facts = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        return facts["rows"] == num_rows and facts["sha256"] == file_sha256(folder / "tokens.arrow")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _put_in_place(part: Path, folder: Path, num_rows: int) -> None:
    """Moves the whole into place. A damaged folder there is moved aside; an equal one, by a faster process, is kept."""
    if folder.exists() and not _is_whole(folder, num_rows):
        aside = folder.with_name(f".part-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        part.rename(folder)
    except OSError:
        if not _is_whole(folder, num_rows):
            raise


def _remove_stale(cache: Path) -> None:
    """Removes what killed processes left half made."""
    for entry in cache.glob(".part-*"):
        if time.time() - entry.stat().st_mtime > _STALE_S:
            shutil.rmtree(entry, ignore_errors=True)
