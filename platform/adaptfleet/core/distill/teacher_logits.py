"""What a teacher says of every labelled token, on disk: zstd Parquet, a file for so many rows, each written whole or not at all.

A file has one Parquet row for each training row of n labelled tokens:
num_labels int32, n
ids        int32, n x K: the most likely tokens of each position, the likeliest first
log_probs  n x B: their log probabilities at the objective's temperature, in nats; where B = K + 1 the last is that of all other tokens
"""

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from adaptfleet.contracts.distillation import Distillation, Offline
from adaptfleet.contracts.errors import DataError, TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.distill.layers import Captured
from adaptfleet.core.distill.losses import CHUNK_POSITIONS, Distributions, Targets, bucketed
from adaptfleet.core.distill.teachers import Teacher, log_probs
from adaptfleet.core.packed_forward import PackedBatch, predictions

_FORMAT = 1
"""Raised when the same teacher gives other files than before."""
_GROUP_ROWS = 16
"""Rows that are decompressed together when one is read."""
_GROUPS_HELD = 256
_FILES_OPEN = 64


@dataclass(frozen=True)
class LogitFiles:
    """The files of one teacher on one set of rows."""

    folder: Path
    num_rows: int
    rows_per_file: int

    @classmethod
    def of(cls, spec: Distillation, source: Offline, rows: Rows, teacher_revision: str) -> "LogitFiles":
        """In the home's cache, by what decides their content; all workers must see it."""
        made_of = [_FORMAT, _rows_sha256(rows), teacher_revision, spec.teacher.dtype, spec.temperature, source.model_dump(mode="json")]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
        return cls(home() / "cache" / "teacher-logits" / key, len(rows), source.rows_per_file)

    def __len__(self) -> int:
        return -(-self.num_rows // self.rows_per_file)

    def file(self, part: int) -> Path:
        return self.folder / f"part-{part:06}.parquet"

    def rows(self, part: int) -> range:
        return range(part * self.rows_per_file, min((part + 1) * self.rows_per_file, self.num_rows))

    def missing(self) -> list[int]:
        """Parts that are not there whole."""
        return [part for part in range(len(self)) if not _is_whole(self.file(part), len(self.rows(part)))]

    def check_room(self, num_labels: int, bytes_a_label: int) -> None:
        """DataError where the disk is too small for the missing files, however badly they compress."""
        share = len(self.missing()) / max(1, len(self))
        needed = int(num_labels * bytes_a_label * share)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DataError(
                f"the teacher's distributions of {num_labels:,} tokens need up to {needed:,} bytes below {self.folder.parent}, where "
                f"{free:,} are free. Free space there, or lower objective.source.k."
            )


def _rows_sha256(rows: Rows) -> str:
    """Of the tokens and their order: the token files' folders are named by a hash of rows, tokenizer and limits."""
    digest = hashlib.sha256(json.dumps([file.file.parent.name for file in rows.files]).encode())
    digest.update(np.ascontiguousarray(rows.order_N).tobytes())
    return digest.hexdigest()


def bytes_a_label(source: Offline, vocab_size: int) -> int:
    """Before compression."""
    k = min(source.k, vocab_size)
    return 4 * k + (2 if source.precision == "float16" else 4) * (k + 1)


@torch.no_grad()
def write_part(
    files: LogitFiles,
    part: int,
    teacher: PreTrainedModel,
    rows: Sequence[Any],
    spec: Distillation,
    source: Offline,
    vocab_size: int,
    pack_tokens: int,
) -> None:
    """Scores a file's rows, packed. `vocab_size`: of the student's head."""
    numbers = list(files.rows(part))
    mine = [rows[i] for i in numbers]
    scored: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
    for pack in plan_packs([len(row) for row in mine], pack_tokens, list(range(len(mine)))):
        batch = PackedBatch.stack([pack_arrays(pack, mine, pack_tokens, pad_id=0)], teacher.device)
        ids_NK, log_probs_NB = _most_likely(teacher, batch, spec.temperature, source.k, vocab_size)
        ends = np.cumsum([mine[i].num_labels for i in pack.indices])[:-1]
        for i, ids, found in zip(pack.indices, np.split(ids_NK, ends), np.split(log_probs_NB, ends), strict=True):
            scored[i] = ids.reshape(-1), found.reshape(-1)
    kind = pa.float16() if source.precision == "float16" else pa.float32()
    table = pa.table(
        {
            "num_labels": pa.array([row.num_labels for row in mine], pa.int32()),
            "ids": pa.array([scored[i][0] for i in range(len(mine))], pa.list_(pa.int32())),
            "log_probs": pa.array([scored[i][1].astype(source.precision) for i in range(len(mine))], pa.list_(kind)),
        }
    )
    files.folder.mkdir(parents=True, exist_ok=True)
    unfinished = files.folder / f".part-{part:06}.{os.uname().nodename}.{os.getpid()}"
    pq.write_table(table, unfinished, compression="zstd", row_group_size=_GROUP_ROWS, use_dictionary=False, use_byte_stream_split=True)
    unfinished.replace(files.file(part))


def _most_likely(
    teacher: PreTrainedModel, batch: PackedBatch, temperature: float, k: int, vocab_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """[N, K] ids and [N, B] log probabilities."""
    hidden_ND, weight_VD, bias_V, _ = predictions(teacher, batch)
    ids, found = [], []
    for hidden_CD in hidden_ND.split(CHUNK_POSITIONS):
        log_p_CV = log_probs(hidden_CD, weight_VD, bias_V, temperature, vocab_size)
        num_kept = min(k, log_p_CV.shape[1])
        ids_CK = log_p_CV.topk(num_kept, dim=-1).indices
        ids.append(ids_CK.int().cpu().numpy())
        found.append(bucketed(log_p_CV, ids_CK, num_kept + (num_kept < log_p_CV.shape[1])).cpu().numpy())
    return np.concatenate(ids), np.concatenate(found)


class OfflineTeacher(Teacher):
    """Reads what a teacher has said, by the numbers of the batch's rows."""

    def __init__(self, files: LogitFiles) -> None:
        self.files = files
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], list[pa.Array]] = OrderedDict()

    def targets(self, batch: PackedBatch, layers: Collection[int]) -> tuple[Targets, Captured]:
        num_positions = batch.num_labels
        found = [self._row(number) for number in batch.rows] if num_positions else []
        num_found = sum(len(ids_nK) for ids_nK, _ in found)
        if num_found != num_positions:
            raise TrainingError(
                f"the teacher's files in {self.files.folder} hold {num_found} positions of these rows, which have {num_positions} labels. "
                "Remove the folder: it is made anew."
            )
        ids, log_p = (torch.from_numpy(np.concatenate(side)) for side in zip(*found, strict=True)) if found else (torch.empty(0),) * 2
        device = batch.input_ids_BT.device

        def distributions(part: slice) -> Distributions:
            # rounding on disk has moved the sums away from one
            return Distributions(log_p[part].to(device).float().log_softmax(dim=-1), ids[part].to(device).long())

        return distributions, Captured()

    def _row(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
        """[n, K] ids and [n, B] log probabilities of a row's n labelled tokens."""
        part, place = divmod(number, self.files.rows_per_file)
        group, at = divmod(place, _GROUP_ROWS)
        num_labels, ids, log_p = (column[at] for column in self._group(part, group))
        shape = num_labels.as_py(), -1
        return ids.values.to_numpy().reshape(shape), log_p.values.to_numpy(zero_copy_only=False).reshape(shape)

    def _group(self, part: int, group: int) -> list[pa.Array]:
        def read() -> list[pa.Array]:
            file = _recent(self._open, part, _FILES_OPEN, lambda: pq.ParquetFile(self.files.file(part)))
            return [column.combine_chunks() for column in file.read_row_group(group).columns]

        return _recent(self._groups, (part, group), _GROUPS_HELD, read)


def _recent(kept: OrderedDict[Any, Any], key: Any, limit: int, make: Callable[[], Any]) -> Any:
    """The value of a key, made where it is not kept; the longest unused leave first."""
    value = kept.pop(key) if key in kept else make()
    kept[key] = value
    if len(kept) > limit:
        kept.popitem(last=False)
    return value


def _is_whole(file: Path, num_rows: int) -> bool:
    try:
        return int(pq.read_metadata(file).num_rows) == num_rows
    except (OSError, pa.ArrowInvalid):
        return False
