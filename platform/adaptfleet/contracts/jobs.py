"""What `jobs/finetune.py` runs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.methods import Lora, Method
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.names import DEFAULT_ALIAS, SafeAlias, SafeName
from adaptfleet.contracts.tracking import TrackingSpec


class TrainSpec(Spec):
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many optimizer steps, whatever `epochs` says; the learning rate's schedule ends there too."""
    pack_tokens: Annotated[int, Field(ge=16)] = 1024
    """Length of a packed row. A longer example is an error, unless `truncate`."""
    packs_per_step: Annotated[int, Field(ge=1)] = 1
    """Packed rows of one optimizer step, over all workers."""
    truncate: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the decoder layers. `auto`: where a C++ compiler (CPU) or a GPU is there and the run is long enough to pay."""
    seed: int = 0


class EvaluationSpec(Spec):
    times: Annotated[int, Field(ge=1)] = 1
    """How often during the run, the end included, evenly spaced."""
    max_loss_rows: Annotated[int, Field(ge=1)] = 128
    """Held-out rows for loss and perplexity."""
    max_generated_rows: Annotated[int, Field(ge=0)] = 32
    """Held-out rows answered greedily for exact match, field F1 and valid JSON; 0 leaves these out."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 192
    max_sample_rows: Annotated[int, Field(ge=0)] = 4
    """Held-out rows answered before training too, for the report; 0 leaves them out."""


class CheckpointSpec(Spec):
    every_steps: Annotated[int, Field(ge=1)] = 50
    keep: Annotated[int, Field(ge=1)] = 2


class ClusterSpec(Spec):
    workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """None: an equal share of the cluster's CPUs."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """None: 1 where the cluster has GPUs, else 0."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run gives up; each restart resumes from the last checkpoint."""


class PublishSpec(Spec):
    name: SafeName
    """The adapter's name in the registry and on the endpoint."""
    alias: SafeAlias | None = DEFAULT_ALIAS
    """The alias moved to the new version; None moves none."""


class FinetuneJob(Spec):
    job: Literal["finetune"] = "finetune"
    run: SafeName | None = None
    """Name of the run's folder, by default the published name and the contract's fingerprint. The same contract submitted again resumes or
    reuses its run."""
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    method: Method = Lora()
    train: TrainSpec = TrainSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    publish: PublishSpec

    @model_validator(mode="after")
    def _packs_divide(self) -> "FinetuneJob":
        if self.train.packs_per_step % self.cluster.workers:
            raise ValueError(
                f"train.packs_per_step is {self.train.packs_per_step}, which {self.cluster.workers} workers cannot share evenly; "
                f"use a multiple of cluster.workers"
            )
        return self

    def run_name(self) -> str:
        return self.run or f"{self.publish.name}-{self.fingerprint()}"
