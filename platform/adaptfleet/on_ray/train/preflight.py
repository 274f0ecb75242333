"""Everything about a fine-tune that can be wrong is found here, before a worker starts."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adaptfleet.contracts.errors import AdaptfleetError, ContractError, DataError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.data.datasets import Dataset, load_dataset
from adaptfleet.core.data.encoding import Encoded, encode_all
from adaptfleet.core.data.sample_order import epoch_order
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.models.loading import base_revision, load_tokenizer, resolve_model_folder
from adaptfleet.core.steps import StepPlan, plan_steps
from adaptfleet.store.registry import Registry


@dataclass(frozen=True)
class Prepared:
    base: str
    base_revision: str
    dataset: Dataset
    train_rows: list[Encoded]
    test_rows: list[Encoded]
    plan: StepPlan


def prepare(job: FinetuneJob, registry: Registry) -> Prepared:
    """Model, data and method held against each other. Faults of the model and of the data are reported together."""
    offenders: list[AdaptfleetError] = []
    base_id = ServingSpec(model=job.model).base_id()
    if job.publish and job.publish.name == base_id:
        offenders.append(ContractError(f"publish.name is {base_id!r}, the base's own id on the endpoint; give the adapter another name."))
    folder = resolve_model_folder(job.model)
    tokenizer = load_tokenizer(folder, job.model.trust_remote_code)
    try:
        _check_method(folder, job)
    except ContractError as error:
        offenders.append(error)

    def fetch(reference: str) -> Path:
        return registry.fetch(registry.resolve(reference), home() / "cache" / "artifacts")

    try:
        dataset = load_dataset(job.data, fetch)
        # A run may look at the first held-out rows alone. Files tend to be sorted, so these would be no fair sample.
        dataset = replace(dataset, test=[dataset.test[i] for i in epoch_order(len(dataset.test), job.data.seed, epoch=0)])
        limit = job.train.pack_tokens
        train_rows = encode_all(dataset.train, tokenizer, limit, job.train.truncate)
        test_rows = encode_all(dataset.test, tokenizer, limit, job.train.truncate)
        if not test_rows:
            raise DataError(f"no row of {job.data.train!r} is held out; raise data.test_fraction or give data.test.")
    except DataError as error:
        offenders.append(error)
    if offenders:
        raise type(offenders[0])("\n".join(map(str, offenders)))
    plan = plan_steps(train_rows, job.train)
    return Prepared(base_id, base_revision(folder), dataset, train_rows, test_rows, plan)


def _check_method(folder: Path, job: FinetuneJob) -> None:
    """Targets and ranks against the architecture, without its weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=job.model.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=job.model.trust_remote_code)
    adaptation(job.method).check(model)
