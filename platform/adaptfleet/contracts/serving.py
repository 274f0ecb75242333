"""What the OpenAI-compatible endpoint serves."""

from typing import Annotated, Any, Literal

from pydantic import Field

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


class ServingSpec(Spec):
    model: ModelSpec = ModelSpec()
    served_name: SafeName | None = None
    """The base's id on the endpoint. None: the model source's last part."""
    auth: Literal["api-key", "none"] = "api-key"
    """`api-key`: a bearer key from ADAPTFLEET_API_KEYS (comma separated) or the file `api-keys` in ADAPTFLEET_HOME."""
    tls: TlsSpec | None = None
    """HTTPS by Serve's own proxy. None: HTTP, for loopback or behind something that speaks HTTPS."""
    traces_endpoint: str | None = None
    """An OpenTelemetry collector: `http://host:4317` (gRPC), or `http://host:4318/v1/traces`. None: no traces."""
    max_loras: Annotated[int, Field(ge=1)] = 8
    """Adapters that may share one batch."""
    max_cpu_loras: Annotated[int, Field(ge=1)] = 64
    """Adapters kept in host memory, the least recently used leaves first."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Sequences of one batch; continuous batching admits the next as one ends."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    """Memory of the paged KV cache on a CPU. On a GPU the engine takes what is free."""
    max_request_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    max_file_bytes: Annotated[int, Field(ge=1024)] = 100 * 1024 * 1024
    """Of one file of `/v1/files`."""
    embeddings: EmbeddingsSpec | None = None
    """None: `/v1/embeddings`, `/pooling` and `/score` are refused."""
    cpus_per_replica: Annotated[int, Field(ge=1)] | None = None
    """Cores reserved for a replica, and threads of its engine. None: every core of the machine but one."""
    enforce_eager: bool = True
    """False compiles the engine's graph: a slower start, faster tokens."""
    engine_args: dict[str, Any] = {}
    """Passed to vLLM as they are, by vLLM's own names (`tensor_parallel_size: 2`). The one escape hatch."""

    def base_id(self) -> str:
        return self.served_name or self.model.source.rstrip("/").rsplit("/", 1)[-1].partition("@")[0].lower()
