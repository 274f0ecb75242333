"""What the OpenAI-compatible endpoint serves."""

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.names import SafeName


class EmbeddingsSpec(Spec):
    """Embeddings, pooling and scores, by a second engine of the same base."""

    pooling: Literal["mean", "last"] = "mean"
    """Of the last layer's hidden states."""
    cpus: Annotated[int, Field(ge=1)] = 1
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    min_replicas: Annotated[int, Field(ge=0)] = 0
    """0: none while nobody asks; the first request then waits for an engine to start."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    idle_s: Annotated[float, Field(ge=0)] = 600.0
    """Without requests for so long, replicas above the minimum end."""


class TlsSpec(Spec):
    certificate: str
    """A PEM file with the certificate and those between it and its root."""
    key: str
    """A PEM file with its private key, without a password."""


class ReplicaRange(Spec):
    """As many replicas as the work needs."""

    min: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks; the first request waits for one to start."""
    max: Annotated[int, Field(ge=1)]
    ttft_s: Annotated[float, Field(gt=0)] = 2.0
    """More replicas while requests wait and nine in ten first tokens take longer."""
    requests_per_replica: Annotated[float, Field(gt=0)] | None = None
    """Requests one replica is to have at once. None: three quarters of max_num_seqs."""
    kv_usage: Annotated[float, Field(gt=0, le=1)] = 0.85
    """More replicas while the KV caches are fuller."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> "ReplicaRange":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; a range goes upwards.")
        return self


class BaseSpec(Spec):
    """One base of the endpoint: its engine, its replicas, and how many adapters of it are held."""

    model: ModelSpec = ModelSpec()
    served_name: SafeName | None = None
    """The base's id on the endpoint. None: the model source's last part."""
    max_loras: Annotated[int, Field(ge=1)] = 8
    """Adapters that may share one batch."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    """Adapters kept in host memory, the least recently used leaves first."""
    pinned: tuple[SafeName, ...] = Field(default=(), strict=False)
    """Adapters whose version in production never leaves its slot."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Sequences of one batch; continuous batching admits the next as one ends."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    """Memory of the paged KV cache on a CPU. On a GPU the engine takes what is free."""
    max_waiting: Annotated[int, Field(ge=0)] = 256
    """Requests of a replica beyond max_num_seqs. What comes after them gets a 503 at once, to try again later."""
    replicas: Annotated[
        Annotated[int, Field(ge=1), Tag("number")] | Annotated[ReplicaRange, Tag("range")],
        Discriminator(lambda value: "range" if isinstance(value, (dict, ReplicaRange)) else "number"),
    ] = 1
    """A number, or a range such as {min: 1, max: 4}."""
    stall_s: Annotated[float, Field(gt=0)] = 60.0
    """An engine that has requests and takes no step for so long is hung: it is ended, and another started."""
    drain_s: Annotated[float, Field(ge=0)] = 120.0
    """How long a replica that is to go may finish what it has."""
    cpus_per_replica: Annotated[int, Field(ge=1)] | None = None
    """Cores reserved for a replica, and threads of its engine. None: an equal share of the machine's, with one left to the rest."""
    enforce_eager: bool = True
    """False compiles the engine's graph: a slower start, faster tokens."""
    gpus_per_replica: Annotated[int, Field(ge=0)] | None = None
    """None: as many as the engine is split over, where the cluster has any now. To be given where nodes come with the replica."""
    engine_args: dict[str, Any] = {}
    """Passed to vLLM as they are, by vLLM's own names (`tensor_parallel_size: 2`). The one escape hatch."""

    @model_validator(mode="after")
    def _pins_leave_a_slot(self) -> Self:
        if len(set(self.pinned)) >= self.max_loras:
            raise ValueError(
                f"pinned has {len(set(self.pinned))} adapters and max_loras is {self.max_loras}: no slot is left for others. "
                f"Pin fewer, or raise max_loras."
            )
        return self

    def max_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max

    def min_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min

    def base_id(self) -> str:
        return self.served_name or self.model.source.rstrip("/").rsplit("/", 1)[-1].partition("@")[0].lower()


_SHARED = ("auth", "tls", "traces_endpoint", "metrics_port", "max_request_bytes", "max_file_bytes")
"""What is the endpoint's and every base's."""


class ServingSpec(BaseSpec):
    """The endpoint and its first base, whose keys are given as if it were the only one."""

    more_bases: tuple[BaseSpec, ...] = Field(default=(), strict=False)
    """Further bases, each with an engine, replicas and adapters of its own."""
    auth: Literal["api-key", "none"] = "api-key"
    """`api-key`: a bearer key from ADAPTFLEET_API_KEYS (comma separated) or the file `api-keys` in ADAPTFLEET_HOME."""
    tls: TlsSpec | None = None
    """HTTPS by Serve's own proxy. None: HTTP, for loopback or behind something that speaks HTTPS."""
    traces_endpoint: str | None = None
    """An OpenTelemetry collector: `http://host:4317` (gRPC), or `http://host:4318/v1/traces`. None: no traces."""
    metrics_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """A port of each replica's node for its own `/metrics`, with a key as everywhere: a scrape there wakes no engine and keeps none awake.
    None: the endpoint's `/metrics` alone, which one of the replicas answers."""
    max_request_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    max_file_bytes: Annotated[int, Field(ge=1024)] = 100 * 1024 * 1024
    """Of one file of `/v1/files`."""
    embeddings: EmbeddingsSpec | None = None
    """Of the first base and its adapters. None: `/v1/embeddings`, `/pooling` and `/score` are refused."""

    @model_validator(mode="after")
    def _bases_differ(self) -> Self:
        specs: tuple[BaseSpec, ...] = (self, *self.more_bases)
        ids = Counter(spec.base_id() for spec in specs)
        pins = Counter(name for spec in specs for name in set(spec.pinned))
        faults = [
            f"{num} bases have the id {known_as!r}; an id is one base's. Give them different ones with served_name."
            for known_as, num in ids.items()
            if num > 1
        ]
        faults += [
            f"{name!r} is pinned for {num} bases; an adapter has one. Leave it with the base it was trained on."
            for name, num in pins.items()
            if num > 1
        ]
        if faults:
            raise ValueError(" ".join(faults))
        return self

    def bases(self) -> tuple["ServingSpec", ...]:
        """A spec for each base, as if it were the only one; the first one's first. The embeddings go with that one."""
        shared = {name: getattr(self, name) for name in _SHARED}
        first = self.model_copy(update={"more_bases": ()})
        return (
            first,
            *(ServingSpec(**{name: getattr(base, name) for name in BaseSpec.model_fields}, **shared) for base in self.more_bases),
        )
