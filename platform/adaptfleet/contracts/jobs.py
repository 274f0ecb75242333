"""What `jobs/finetune.py` and `jobs/distill.py` run."""

import json
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.methods import Lora, Method, ServedAs
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.names import DEFAULT_ALIAS, SafeAlias, SafeName
from adaptfleet.contracts.objectives import Dpo, Objective, Sft
from adaptfleet.contracts.tracking import TrackingSpec


class TrainSpec(Spec):
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many optimizer steps, whatever `epochs` says; the learning rate's schedule ends there too."""
    pack_tokens: Annotated[int, Field(ge=16)] = 1024
    """Length of a packed row. A longer example is an error, unless `truncate`."""
    packs_per_step: Annotated[int, Field(ge=1)] | None = None
    """Packed rows of one optimizer step, over all workers; 1 where `tokens_per_step` is not given either."""
    tokens_per_step: Annotated[int, Field(ge=16)] | None = None
    """The same in tokens: a multiple of `pack_tokens`. The padding of packed rows counts, about one token in fifty."""
    truncate: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the decoder layers. `auto`: where a C++ compiler (CPU) or a GPU is there and the run is long enough to pay."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only the inputs of the decoder layers and compute what is in them again in the backward pass: less memory, a fifth slower.
    `auto`: where a worker's memory would not hold the activations."""
    seed: int = 0

    @property
    def num_packs(self) -> int:
        """Packed rows of one optimizer step, over all workers."""
        return self.tokens_per_step // self.pack_tokens if self.tokens_per_step else self.packs_per_step or 1

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> "TrainSpec":
        tokens, pack = self.tokens_per_step, self.pack_tokens
        if tokens and self.packs_per_step:
            raise ValueError(
                f"packs_per_step ({self.packs_per_step}) and tokens_per_step ({tokens}) both give the size of a step; leave out one"
            )
        if tokens and tokens % pack:
            fitting = [str(multiple) for multiple in (tokens // pack * pack, (tokens // pack + 1) * pack) if multiple]
            raise ValueError(f"tokens_per_step is {tokens}, no multiple of pack_tokens ({pack}); use {' or '.join(fitting)}")
        return self


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


class WorkerRange(Spec):
    """An elastic number of workers: as many as there is room for, and training goes on when it changes."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _in_order(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max {self.max}")
        return self


ShardMode = Literal["auto", "none", "ddp", "fsdp2"]


class ClusterSpec(Spec):
    workers: Annotated[
        Annotated[int, Field(ge=1), Tag("number")] | Annotated[WorkerRange, Tag("range")],
        Discriminator(lambda value: "range" if isinstance(value, (dict, WorkerRange)) else "number"),
    ] = 1
    """A number, or `{min: 1, max: 8}`: workers may come and go."""
    shard: ShardMode = "auto"
    """`ddp`: the whole base on each worker, gradients of the trained part summed. `fsdp2`: every layer's parameters sharded over them.
    `auto`: `ddp` where the base fits a worker's memory, else `fsdp2`. `none`: one worker."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Workers that hold a part of each layer and compute it together, for layers too large for one device; the parts are sharded with
    `fsdp2` over the groups of so many."""
    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """None: an equal share of the cluster's CPUs."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """None: 1 where the cluster has GPUs, else 0."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run gives up; each restart resumes from the last checkpoint. Preempted nodes do not count."""
    resize_check_interval_s: Annotated[float, Field(gt=0)] = 5.0
    """Elastic runs: how often the cluster is looked at for room for more workers."""

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @model_validator(mode="after")
    def _one_worker_unsharded(self) -> "ClusterSpec":
        if self.shard == "none" and self.max_workers > 1:
            raise ValueError(f"shard is 'none', but there may be {self.max_workers} workers; use auto, ddp or fsdp2, or workers: 1")
        return self

    @property
    def num_shares(self) -> int:
        """Workers, or groups of workers, that each take a share of a step: the most there may be."""
        return self.max_workers // self.tensor_parallel

    @model_validator(mode="after")
    def _whole_groups(self) -> "ClusterSpec":
        size = self.tensor_parallel
        if size == 1:
            return self
        if not isinstance(self.workers, int):
            raise ValueError(
                f"tensor_parallel is {size}, and between {self.workers.min} and {self.workers.max} workers may be a number that makes no "
                "whole groups; give a number of workers"
            )
        if self.workers % size:
            raise ValueError(f"workers is {self.workers}, no multiple of tensor_parallel ({size}); every group needs {size} of them")
        if self.shard == "ddp":
            raise ValueError(f"shard is 'ddp', the whole base on each worker, but tensor_parallel is {size}; use auto or fsdp2")
        return self


class PublishSpec(Spec):
    name: SafeName
    """The name in the registry and on the endpoint."""
    alias: SafeAlias | None = DEFAULT_ALIAS
    """The alias moved to the new version; None moves none."""
    merged: bool = False
    """Publish the base with the adapter merged into it, a checkpoint of its own, where an adapter could be served."""


class FinetuneJob(Spec):
    job: Literal["finetune"] = "finetune"
    run: SafeName | None = None
    """Name of the run's folder, by default the published name and the contract's fingerprint. The same contract submitted again resumes or
    reuses its run."""
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    method: Method = Lora()
    objective: Objective = Sft()
    train: TrainSpec = TrainSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    publish: PublishSpec | None
    """None: train and evaluate only; the result stays in the run's folder."""

    @model_validator(mode="after")
    def _every_worker_has_a_pack(self) -> "FinetuneJob":
        train, shares = self.train, self.cluster.num_shares
        size = f"train.tokens_per_step is {train.tokens_per_step}, {train.num_packs} packed rows of {train.pack_tokens} tokens"
        size = size if train.tokens_per_step else f"train.packs_per_step is {train.num_packs}"
        sharing = f"{shares} workers" if self.cluster.tensor_parallel == 1 else f"{shares} groups of {self.cluster.tensor_parallel} workers"
        if train.num_packs < shares:
            raise ValueError(f"{size}, fewer than the {sharing} there may be; raise it")
        if isinstance(self.cluster.workers, int) and train.num_packs % shares:
            raise ValueError(f"{size}, which {sharing} cannot share evenly; use a multiple of {shares}")
        return self

    @model_validator(mode="after")
    def _layers_can_be_cut(self) -> "FinetuneJob":
        size, reason = self.cluster.tensor_parallel, self.method.why_uncut()
        if size > 1 and reason:
            raise ValueError(
                f"method.kind {self.method.kind!r} cannot be trained with cluster.tensor_parallel {size}: {reason}. "
                "Use lora, or tensor_parallel: 1 with shard: fsdp2"
            )
        return self

    @model_validator(mode="after")
    def _matrices_can_be_sharded(self) -> "FinetuneJob":
        if self.method.kind == "adalora" and self.cluster.shard == "fsdp2" and self.cluster.max_workers > 1:
            raise ValueError(
                "cluster.shard is 'fsdp2', but method.kind 'adalora' ranks whole matrices against each other; use shard: ddp, or lora"
            )
        return self

    @model_validator(mode="after")
    def _activations_can_be_made_again(self) -> "FinetuneJob":
        if self.train.gradient_checkpointing == "on" and self.method.kind == "prefix":
            raise ValueError(
                "train.gradient_checkpointing is 'on', but method.kind 'prefix' reaches the layers as a cache, which a layer computed "
                "twice would take twice; use auto or off, or method.kind prompt"
            )
        return self

    @model_validator(mode="after")
    def _what_is_published_can_be_served(self) -> "FinetuneJob":
        if self.publish and self.method.served_as() is None:
            raise ValueError(
                f"method.kind {self.method.kind!r} cannot be published: {self.method.why_unserved()}. "
                "Write publish: null to train and evaluate it, or use lora"
            )
        return self

    @model_validator(mode="after")
    def _dpo_has_its_reference(self) -> "FinetuneJob":
        changes_the_base = self.method.kind in ("full", "bottleneck", "llama-adapter") or getattr(self.method, "init", None) == "pissa"
        if isinstance(self.objective, Dpo) and changes_the_base:
            raise ValueError(
                f"objective.kind 'dpo' measures against the base with the method switched off, which {self.method.kind!r} "
                f"{'with init pissa ' if self.method.kind == 'lora' else ''}cannot be; use plain lora, or objective.kind 'orpo'"
            )
        return self

    @model_validator(mode="after")
    def _distillation_fits_the_method(self) -> "FinetuneJob":
        spec = self.objective
        learns_tokens = hasattr(self.method, "num_virtual_tokens")
        if isinstance(spec, Distillation) and learns_tokens and (spec.align.is_on or spec.source.kind == "on_policy"):
            what = "align" if spec.align.is_on else "source.kind 'on_policy'"
            raise ValueError(f"objective.{what} is not for methods with virtual tokens such as {self.method.kind!r}; use lora or full")
        return self

    def published_as(self) -> ServedAs:
        """The kind of the artifact. Only for jobs that publish."""
        served = self.method.served_as()
        assert served is not None
        return "model" if self.publish and self.publish.merged else served

    def published_name(self) -> str:
        """Only for jobs that publish."""
        assert self.publish is not None
        return self.publish.name

    def run_name(self) -> str:
        return self.run or f"{self.publish.name if self.publish else self.method.kind}-{self.fingerprint()}"


class DistillJob(FinetuneJob):
    """A fine-tune of the student (`model`) towards a teacher (`objective.teacher`). With `method.kind: full` a smaller student becomes a
    model of its own; with LoRA an adapter."""

    job: Literal["distill"] = "distill"  # type: ignore[assignment]  # a contract of one program is no contract of the other
    objective: Distillation


def stored_job(text: str) -> FinetuneJob:
    """A job from its own JSON, of its own kind."""
    kind = DistillJob if json.loads(text).get("job") == "distill" else FinetuneJob
    return kind.model_validate_json(text, strict=False)
