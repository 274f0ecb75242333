"""What `jobs/compress.py` runs: a recipe of steps that makes a smaller or faster checkpoint of a model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from adaptfleet.contracts.artifacts import ArtifactKind
from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.jobs import ClusterSpec, TrainSpec
from adaptfleet.contracts.methods import Lora
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.names import DEFAULT_ALIAS, SafeAlias, SafeName
from adaptfleet.contracts.objectives import Objective, Sft
from adaptfleet.contracts.schemes import W8A8, Fp8, Mixed, Scheme, Target

Share = Annotated[float, Field(ge=0, lt=1)]
ORDER = ("prune", "recover", "merge", "quantize", "tune", "recover", "publish")


class Prune(Spec):
    """Structured pruning to a smaller dense checkpoint. Ratios are shares taken away; what is left is rounded to what kernels want."""

    kind: Literal["prune"] = "prune"
    importance: Literal["activation", "taylor", "magnitude"] = "activation"
    """What a unit is worth: mean |activation| (arXiv 2407.14679), first-order |activation x gradient| (arXiv 1906.10771), or the norm of
    its weights."""
    mlp_width: Share = 0.0
    """Share of each feed-forward's channels."""
    kv_groups: Annotated[int, Field(ge=0)] = 0
    """Key-value groups taken from each layer, with their query heads."""
    hidden_width: Share = 0.0
    """Share of the residual stream's channels."""
    layers: Annotated[int, Field(ge=0)] = 0
    """Decoder layers, those that change the residual stream least (arXiv 2403.03853)."""
    round_to: Literal[32, 64, 128] = 64
    """Widths left are multiples of it."""
    refit: bool = False
    """Fit what stays of each projection to what the whole one gave on the calibration rows, by least squares. Wants several times as many
    tokens in these rows as the projection has inputs."""

    @property
    def takes_nothing(self) -> bool:
        return not (self.mlp_width or self.kv_groups or self.hidden_width or self.layers)


class Recover(Spec):
    """Training that heals what pruning or rounding broke, through the fine-tuning job's own trainer; `text` rows, whose every token counts,
    heal best. Before `merge` the adapter is folded in; after `quantize` it stays an adapter, published as `NAME-recovery` and served on the
    rounded model."""

    kind: Literal["recover"] = "recover"
    method: Lora = Lora()
    objective: Objective = Sft()
    data: DataSpec | None = None
    """None: the calibration data's training rows."""
    train: TrainSpec = TrainSpec(epochs=1.0)
    cluster: ClusterSpec = ClusterSpec()


class Merge(Spec):
    """Folds the recovery's adapter into the weights."""

    kind: Literal["merge"] = "merge"


class Quantize(Spec):
    """Rounds the linear layers' weights into a compressed-tensors checkpoint. llm-compressor does it in an environment of its own."""

    kind: Literal["quantize"] = "quantize"
    scheme: Scheme = W8A8()
    rotate: bool = False
    """First turn the residual stream and the values of each head by random rotations (arXiv 2404.00456): the model computes the same, but
    has no outliers that spoil 8-bit activations. The head's weights become its own, so where it shares the embedding's round it too."""
    keep: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear modules that stay as they are: `down_proj`, or one layer's, `layers.0.mlp.down_proj`."""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """`fp8`: scales for an 8-bit KV cache, calibrated. Twice the tokens in the same memory; slower on a CPU."""
    head: Literal["keep", "w8a8"] = "keep"
    """The output head. `w8a8`: rounded to 8 bits; where it shares the embedding's weights it gets its own."""
    embedding: Literal["keep", "w8", "w4"] = "keep"
    """The embedding's rows, rounded to 8 or 4 bits. Where the head shares its weights, `head` must be rounded too: with `w8` both together
    then take the bytes of the one before. On a CPU it takes the platform's plug-in, which the endpoint has; stock vLLM cannot load it."""

    def why_unserved(self, target: Target) -> str | None:
        return self.scheme.why_unserved(target)

    @property
    def to_nearest(self) -> "Quantize | None":
        """The same step by rounding to nearest. None: it does so, or measures each layer first."""
        if isinstance(self.scheme, Fp8 | Mixed) or self.scheme.algorithm == "rtn":
            return None
        return self.model_copy(update={"scheme": self.scheme.model_copy(update={"algorithm": "rtn"})})

    @model_validator(mode="after")
    def _head_with_embedding(self) -> "Quantize":
        if self.embedding != "keep" and self.head == "keep":
            raise ValueError(f"embedding is {self.embedding!r} but head is 'keep'; round the head too (head: w8a8), or keep the embedding")
        return self


class Tune(Spec):
    """Heals a rounded model in place: the scales of its rounded layers learn what the recipe's parent says of each next token (forward KL),
    the codes stay. Format, bytes and speed are what they were."""

    kind: Literal["tune"] = "tune"
    data: DataSpec | None = None
    """None: the calibration data's training rows."""
    num_rows: Annotated[int, Field(ge=1)] = 256
    """Exactly so many; fewer are an error."""
    train: TrainSpec = TrainSpec(epochs=1.0, pack_tokens=512, learning_rate=2e-3, truncate=True)
    """The learning rate is of a scale's relative change. Rows longer than a packed row are cut."""


class Publish(Spec):
    kind: Literal["publish"] = "publish"
    name: SafeName
    """The name in the registry."""
    alias: SafeAlias | None = DEFAULT_ALIAS
    """The alias moved to the new version; None moves none."""


Step = Annotated[Prune | Recover | Merge | Quantize | Tune | Publish, Field(discriminator="kind")]


class CalibrationSpec(Spec):
    """The rows that importance, sensitivity and activation ranges are measured on: training rows, in the seeded order."""

    data: DataSpec = DataSpec()
    num_rows: Annotated[int, Field(ge=1)] = 128
    """Exactly so many; fewer are an error."""
    max_tokens: Annotated[int, Field(ge=16)] = 512
    """Longer rows are cut."""


class ProofSpec(Spec):
    """What is measured of the parent and of the result, in one run, and kept in the manifest."""

    in_domain: DataSpec | None = None
    """Its held-out rows. None: those of the calibration data."""
    out_of_domain: DataSpec | None = None
    """Held-out rows of another domain. None: not measured."""
    max_rows: Annotated[int, Field(ge=2)] = 64
    answers: bool = False
    """Answer the held-out rows greedily too, for exact match, field F1 and valid JSON."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 80
    adapters: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Published adapters of the parent, `name`, `name@version` or `name@alias`: measured on the parent and on the result, which serves them
    too where it was only rounded."""
    num_resamples: Annotated[int, Field(ge=100)] = 2000
    """Of the bootstrap behind each 95% interval."""
    engine: bool = True
    """Load both in vLLM: load time, time to first token, decode speed at batch 1 and 16, KV cache, and the perplexity it computes."""
    rounds: Annotated[int, Field(ge=1)] = 3
    """Of the engine's measurements; medians count."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Of the engine, on a CPU."""


class CompressJob(Spec):
    job: Literal["compress"] = "compress"
    run: SafeName | None = None
    """Name of the run's folder, by default the published name and the contract's fingerprint."""
    model: ModelSpec = ModelSpec()
    target: Target = "cpu"
    """Where the result is to be served: a scheme that it cannot load is refused."""
    quality_only: bool = False
    """Allow schemes that the target cannot serve, to measure their quality. Nothing is published."""
    calibration: CalibrationSpec = CalibrationSpec()
    steps: Annotated[tuple[Step, ...], Field(strict=False, min_length=1)]
    """In this order, each left out or not: prune, recover, merge, quantize, tune, recover, publish. The result is always measured."""
    proof: ProofSpec = ProofSpec()

    @model_validator(mode="before")
    @classmethod
    def _steps_by_name(cls, values: Any) -> Any:
        """`merge` alone is short for `{kind: merge}`."""
        if isinstance(values, dict) and isinstance(values.get("steps"), list):
            return {**values, "steps": [{"kind": step} if isinstance(step, str) else step for step in values["steps"]]}
        return values

    @model_validator(mode="after")
    def _in_legal_order(self) -> "CompressJob":
        kinds = [step.kind for step in self.steps]
        rounded_at = kinds.index("quantize") if "quantize" in kinds else len(kinds)
        early = kinds[:rounded_at].count("recover")
        places = iter(ORDER)
        if early > 1 or not all(kind in places for kind in kinds):
            raise ValueError(
                f"steps: the order is {', '.join(kinds)}; allowed is {', '.join(ORDER)}, each left out or not: recover before merge heals "
                "what is pruned, tune and recover after quantize heal what is rounded"
            )
        wrong: list[str] = []
        if early and "prune" not in kinds:
            wrong.append("recover has nothing to heal: write prune before it, write it after quantize, or use jobs/finetune.py")
        if early and "merge" not in kinds:
            wrong.append("recover leaves an adapter, which is not rounded: write merge after it")
        if "merge" in kinds and not early:
            wrong.append("merge has no adapter to fold in: write recover before it, or leave merge out")
        if "tune" in kinds and "quantize" not in kinds:
            wrong.append("tune has no rounded layer to heal: write quantize before it, or leave it out")
        if not {"prune", "quantize"} & set(kinds):
            wrong.append("nothing is compressed: write prune or quantize")
        if self.quality_only and "publish" in kinds:
            wrong.append("quality_only measures what cannot be served, so nothing is published: leave publish or quality_only out")
        wrong += [
            f"{name!r} would be published, which is longer than the 64 characters of a name"
            for name in self.published_names()
            if len(name) > 64
        ]
        if wrong:
            raise ValueError("steps: " + "; ".join(wrong))
        return self

    @model_validator(mode="after")
    def _target_loads_the_scheme(self) -> "CompressJob":
        quantize = self.step(Quantize)
        reason = quantize.why_unserved(self.target) if quantize else None
        if reason and not self.quality_only:
            raise ValueError(f"steps: {reason}; or write quality_only: true to measure it without publishing")
        if self.quality_only and self.proof.engine and reason:
            raise ValueError("proof.engine is true, but the engine cannot load what is measured for its quality only; set it to false")
        return self

    def takes_parents_adapters(self) -> bool:
        """A model that was only rounded has its parent's shapes, and layers that read the same inputs."""
        quantize, prune = self.step(Quantize), self.step(Prune)
        is_whole = (prune is None or prune.takes_nothing) and self.step(Merge) is None
        return quantize is not None and is_whole and not (quantize.rotate or quantize.scheme.moves_scales)

    @model_validator(mode="after")
    def _adapters_fit(self) -> "CompressJob":
        if self.proof.adapters and not self.takes_parents_adapters():
            raise ValueError(
                f"proof.adapters names {', '.join(self.proof.adapters)}, but the result takes no adapters of its parent: prune changes "
                "shapes, rotate, smoothquant and awq the layers' inputs; leave proof.adapters or these out"
            )
        return self

    def step(self, kind: type) -> Any | None:
        """The recipe's step of this class."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    def published_names(self) -> dict[SafeName, ArtifactKind]:
        """What the job publishes, by name."""
        publish = self.step(Publish)
        if publish is None:
            return {}
        names: dict[SafeName, ArtifactKind] = {publish.name: "model"}
        if [step.kind for step in self.steps[-2:]] == ["recover", "publish"]:
            names[f"{publish.name}-recovery"] = "adapter"
        return names

    def run_name(self) -> str:
        publish = self.step(Publish)
        return self.run or f"{publish.name if publish else 'compress'}-{self.fingerprint()}"
