"""The teacher of a run: found and held against the student before a worker starts, loaded by each worker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PreTrainedModel

from adaptfleet.contracts.distillation import Distillation, Offline, OnPolicy
from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.jobs import FinetuneJob, TrainSpec
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.objectives import Objective as ObjectiveSpec
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.data.datasets import DatasetIndex
from adaptfleet.core.data.token_cache import Encoder, Execute, tokenise, tokenizer_sha256
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.distill.compatibility import check_alignment, check_pieces, check_vocabularies
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.on_policy import OnPolicyDistillation
from adaptfleet.core.distill.pieces import PieceDistillation, TextTeacher
from adaptfleet.core.distill.shared_text import TokenBytes
from adaptfleet.core.distill.teacher_logits import LogitFiles, OfflineTeacher
from adaptfleet.core.distill.teachers import OnlineTeacher
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.models.loading import base_revision, load_base, load_tokenizer, resolve_model_folder
from adaptfleet.core.packed_forward import plain_base
from adaptfleet.core.sharding import shard
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.store.registry import Registry

_LONGEST_ROW = 1 << 20
"""Of a teacher whose configuration names no positions."""
_ROWS_COMPARED = 64


@dataclass(frozen=True)
class FoundTeacher:
    name: str
    """A published model's `name@version`, else the model's id."""
    revision: str
    folder: Path
    vocab_size: int
    """Of the student's head, which may be padded."""

    def parent(self) -> str:
        """In the lineage of what it teaches."""
        return f"teacher:{self.name}:{self.revision[:16]}"


def find_teacher(spec: Distillation, student: ModelSpec, student_folder: Path, tokenizer: Any, registry: Registry) -> FoundTeacher:
    """ModelError or ContractError: there is no such teacher, or it cannot teach this student."""
    local = at_hand(spec.teacher, registry)
    folder = resolve_model_folder(local)
    name = ServingSpec(model=spec.teacher).base_id()
    if local != spec.teacher:
        name = registry.resolve(spec.teacher.source).reference
    if spec.unit == "token":
        check_vocabularies(tokenizer, load_tokenizer(folder, spec.teacher.trust_remote_code), name)
    config = AutoConfig.from_pretrained(student_folder, trust_remote_code=student.trust_remote_code)
    if spec.align.is_on:
        check_alignment(spec.align, config, AutoConfig.from_pretrained(folder, trust_remote_code=spec.teacher.trust_remote_code))
    return FoundTeacher(name, base_revision(folder), folder, config.vocab_size)


def rows_of_teacher(
    spec: Distillation, found: FoundTeacher, tokenizer: Any, dataset: DatasetIndex, train: TrainSpec, rows: Rows, execute: Execute
) -> Rows:
    """The training rows in the tokens of a teacher of another tokenizer, under the same numbers. A row may be as long as the teacher has
    positions; longer ones are cut where the student's may be.

    ModelError or DataError: the teacher cannot read them, or the two tokenizations share too little.
    """
    config = AutoConfig.from_pretrained(found.folder, trust_remote_code=spec.teacher.trust_remote_code)
    theirs = load_tokenizer(found.folder, spec.teacher.trust_remote_code)
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST_ROW
    try:
        tokens = tokenise(dataset, Encoder(theirs, longest, train.truncate), tokenizer_sha256(found.folder, theirs), execute)
    except DataError as error:
        raise DataError(f"the teacher {found.name!r}, of {longest} positions, cannot read all rows in its own tokens: {error}") from None
    teachers = tokens.rows(tokens.train)
    some = range(min(_ROWS_COMPARED, len(rows)))
    sides = TokenBytes(tokenizer, "the student"), TokenBytes(theirs, found.name)
    check_pieces([rows[i] for i in some], [teachers[i] for i in some], *sides, found.name)
    return teachers


def load_teacher(spec: Distillation, folder: str) -> PreTrainedModel:
    """The teacher from the folder that was found, whatever its alias names by now."""
    return load_base(spec.teacher.model_copy(update={"source": folder}))[0]


def captures_layers(spec: ObjectiveSpec) -> bool:
    """Whether single layers are looked into, which compiled ones do not allow."""
    return isinstance(spec, Distillation) and spec.align.is_on


def distillation(
    job: FinetuneJob,
    facts: dict[str, Any],
    student: AdaptedModel,
    teacher: PreTrainedModel | None,
    rows: Rows,
    mesh: DeviceMesh | None,
    end_ids: set[int],
) -> KnowledgeDistillation:
    """The objective of one worker. A teacher beside it lies as the student does: whole, or sharded over the same mesh."""
    spec = job.objective
    assert isinstance(spec, Distillation)
    if isinstance(spec.source, Offline):
        return KnowledgeDistillation(spec, OfflineTeacher(LogitFiles(Path(facts["logits"]), len(rows), spec.source.rows_per_file)), student)
    assert teacher is not None
    online = OnlineTeacher(teacher, spec, facts["vocab_size"], shard(teacher, mesh) if mesh else None)
    if isinstance(spec.source, OnPolicy):
        return OnPolicyDistillation(spec, spec.source, online, student, end_ids, job.train.seed)
    return KnowledgeDistillation(spec, online, student)


def piece_distillation(
    job: FinetuneJob, tokenizer: Any, teacher: PreTrainedModel, rows: Rows, teachers: Rows, mesh: DeviceMesh | None, folder: str
) -> PieceDistillation:
    """The same of a teacher of another tokenizer, which lies in `folder`."""
    spec = job.objective
    assert isinstance(spec, Distillation)
    theirs = load_tokenizer(Path(folder), spec.teacher.trust_remote_code)
    pack_tokens = max(job.train.pack_tokens, int(teachers.lengths.max()))
    reader = TextTeacher(teacher, teachers, pack_tokens, theirs.pad_token_id, shard(teacher, mesh) if mesh else None)
    return PieceDistillation(spec, reader, rows, TokenBytes(tokenizer, "the student"), TokenBytes(theirs, "the teacher"))


def end_ids(student: AdaptedModel, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    configured = plain_base(student).generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}
