"""The teacher of a run: found and held against the student before a worker starts, loaded by each worker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.objectives import Objective as ObjectiveSpec
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.distill.compatibility import check_alignment, check_vocabularies
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.teachers import OnlineTeacher
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.models.loading import base_revision, load_base, load_tokenizer, resolve_model_folder
from adaptfleet.core.packed_forward import plain_base
from adaptfleet.core.sharding import shard
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.store.registry import Registry


@dataclass(frozen=True)
class FoundTeacher:
    name: str
    """A published model's `name@version`, else the model's id."""
    revision: str
    folder: Path

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
    check_vocabularies(tokenizer, load_tokenizer(folder, spec.teacher.trust_remote_code), name)
    if spec.align.is_on:
        configs = [
            AutoConfig.from_pretrained(place, trust_remote_code=side.trust_remote_code)
            for place, side in ((student_folder, student), (folder, spec.teacher))
        ]
        check_alignment(spec.align, *configs)
    return FoundTeacher(name, base_revision(folder), folder)


def load_teacher(spec: Distillation, folder: str) -> PreTrainedModel:
    """The teacher from the folder that was found, whatever its alias names by now."""
    return load_base(spec.teacher.model_copy(update={"source": folder}))[0]


def captures_layers(spec: ObjectiveSpec) -> bool:
    """Whether single layers are looked into, which compiled ones do not allow."""
    return isinstance(spec, Distillation) and spec.align.is_on


def distillation(spec: Distillation, student: AdaptedModel, teacher: PreTrainedModel, num_shards: int) -> KnowledgeDistillation:
    """The objective of one worker. The teacher lies as the student does: whole, or sharded over as many workers."""
    vocab_size = plain_base(student).get_output_embeddings().weight.shape[0]
    online = OnlineTeacher(teacher, spec, vocab_size, shard(teacher, num_shards) if num_shards > 1 else None)
    return KnowledgeDistillation(spec, online, student)
