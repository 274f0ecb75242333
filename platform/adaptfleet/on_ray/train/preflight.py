"""Everything about a fine-tune that can be wrong is found here, before a worker starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.errors import AdaptfleetError, ContractError, DataError, ModelError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.objectives import Dpo, Orpo
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.data.datasets import DatasetIndex, RowNumbers, open_dataset
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.mixture import Mixture
from adaptfleet.core.data.sample_order import permutation
from adaptfleet.core.data.scan import PAIR, TEXT
from adaptfleet.core.data.token_cache import Encoder, tokenise, tokenizer_sha256
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.models.loading import base_revision, load_tokenizer, resolve_model_folder
from adaptfleet.core.recomputation import check_recomputable
from adaptfleet.core.steps import StepPlan, plan_steps
from adaptfleet.core.tensor_parallel import check_splittable
from adaptfleet.on_ray.data.execution import choose_execution
from adaptfleet.on_ray.distill.teacher import FoundTeacher, find_teacher, rows_of_teacher
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.store.registry import Registry


@dataclass(frozen=True)
class Prepared:
    base: str
    base_revision: str
    dataset: DatasetIndex
    train_rows: Rows
    test_rows: Rows
    """In a seeded order: a run may look at the first alone, and files tend to be sorted."""
    test_examples: list[Example]
    """The first of the test rows that have a prompt, to be answered."""
    plan: StepPlan
    teacher: FoundTeacher | None = None
    teachers_rows: Rows | None = None
    """The training rows in the tokens of a teacher of another tokenizer."""


def prepare(job: FinetuneJob, registry: Registry, join_cluster: Callable[[], None]) -> Prepared:
    """Model, data and method held against each other. Faults of the model and of the data are reported together.

    `join_cluster` makes `ray.init()` find a cluster; it is called only where the cluster is to tokenise.
    """
    offenders: list[AdaptfleetError] = []
    base_id = ServingSpec(model=job.model).base_id()
    if job.publish and job.publish.name == base_id:
        offenders.append(ContractError(f"publish.name is {base_id!r}, the base's own id on the endpoint; give the adapter another name."))
    folder = resolve_model_folder(at_hand(job.model, registry))
    tokenizer = load_tokenizer(folder, job.model.trust_remote_code)
    try:
        _check_method(folder, job)
    except ContractError as error:
        offenders.append(error)
    teacher = None
    if isinstance(job.objective, Distillation):
        try:
            teacher = find_teacher(job.objective, job.model, folder, tokenizer, registry)
        except (ContractError, ModelError) as error:
            offenders.append(error)

    def fetch(reference: str) -> Path:
        return registry.fetch(registry.resolve(reference), home() / "cache" / "artifacts")

    try:
        dataset = open_dataset(job.data, fetch)
        if not len(dataset.test):
            raise DataError(f"no row of {job.data.name()!r} is held out; raise data.test_fraction or give data.test.")
        _check_forms(dataset, job)
        encoder = Encoder(tokenizer, job.train.pack_tokens, job.train.truncate)
        execute = choose_execution(job.data.preprocess, len(dataset.train) + len(dataset.test), join_cluster)
        tokens = tokenise(dataset, encoder, tokenizer_sha256(folder, tokenizer), execute)
        train_rows = tokens.rows(tokens.train)
        teachers_rows = None
        if isinstance(job.objective, Distillation) and job.objective.unit == "piece" and teacher is not None:
            teachers_rows = rows_of_teacher(job.objective, teacher, tokenizer, dataset, job.train, train_rows, execute)
    except (DataError, ModelError) as error:
        offenders.append(error)
    if offenders:
        raise type(offenders[0])("\n".join(map(str, offenders)))
    shuffled = permutation(len(tokens.test), job.data.seed, epoch=0)
    num_answered = max(job.evaluation.max_generated_rows, job.evaluation.max_sample_rows)
    examples = _answerable(dataset, dataset.test[shuffled], num_answered)
    plan = plan_steps(train_rows, job.train, Mixture(tuple(map(len, tokens.train_parts)), dataset.weights))
    test_rows = tokens.rows(tokens.test[shuffled])
    return Prepared(base_id, base_revision(folder), dataset, train_rows, test_rows, examples, plan, teacher, teachers_rows)


def _check_forms(dataset: DatasetIndex, job: FinetuneJob) -> None:
    """DataError where the objective is for another form of rows."""
    wants_pairs = isinstance(job.objective, Dpo | Orpo)
    used = np.concatenate([dataset.train, dataset.test])
    are_pairs = np.concatenate([scan.forms_N for scan in dataset.scans])[used] == PAIR
    wrong = used[are_pairs != wants_pairs]
    if len(wrong):
        first = dataset.examples_at(wrong[:1])[0].origin
        what = "have a chosen and a rejected answer, which takes objective.kind dpo or orpo"
        lacks = f"have no chosen and rejected answer, which objective.kind {job.objective.kind!r} trains on"
        raise DataError(f"{len(wrong)} of {len(used)} rows (the first: {first}) {lacks if wants_pairs else what}.")


def _answerable(dataset: DatasetIndex, numbers: RowNumbers, limit: int) -> list[Example]:
    """The first rows that have a prompt."""
    forms = np.concatenate([scan.forms_N for scan in dataset.scans])
    return dataset.examples_at(numbers[forms[numbers] != TEXT][:limit])


def _check_method(folder: Path, job: FinetuneJob) -> None:
    """Targets, ranks and sharding against the architecture, without its weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=job.model.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=job.model.trust_remote_code)
    adaptation(job.method).check(model)
    if job.cluster.tensor_parallel > 1:
        check_splittable(model, job.cluster.tensor_parallel)
    if job.train.gradient_checkpointing == "on":
        check_recomputable(model)
