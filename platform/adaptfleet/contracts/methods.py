"""How the model is adapted: one variant of the union a method."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from adaptfleet.contracts.base import Spec

ALL_LINEAR = "all-linear"

Rank = Annotated[int, Field(ge=1, le=512)]
Share = Annotated[float, Field(ge=0, lt=1)]
Targets = Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
"""Names of linear modules, such as `q_proj`; `all-linear`: every linear module but the output head."""
ServedAs = Literal["adapter", "model"]
"""`adapter`: a LoRA adapter beside others on one base. `model`: a merged checkpoint of its own."""

_NO_LORA = "its change to the model is neither a low-rank product nor a change of weights, so no engine can serve it"


class _Method(Spec):
    def served_as(self) -> ServedAs | None:
        """In which form the endpoint serves the result, exactly as it was trained. None: in none; `why_unserved` says why."""
        return "model"

    def why_unserved(self) -> str:
        return _NO_LORA

    def why_uncut(self) -> str | None:
        """Why it cannot be trained on layers cut by tensor parallelism. None: it can."""
        return "its parameters are not cut along with the rows and columns of layers"


class Lora(_Method):
    """LoRA, arXiv 2106.09685. With `use_rslora` the scale is alpha / sqrt(rank), arXiv 2312.03732; with `use_dora` magnitude and direction
    are learnt apart, arXiv 2402.09353 (served merged); `init: pissa` begins with the base's largest singular vectors, arXiv 2404.02948
    (served as an adapter of twice the rank, which takes the beginning away again)."""

    kind: Literal["lora"] = "lora"
    rank: Rank = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Share = 0.0
    targets: Targets = (ALL_LINEAR,)
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: A random, B zero, so that training begins at the base."""

    @model_validator(mode="after")
    def _one_decomposition(self) -> "Lora":
        if self.use_dora and self.init == "pissa":
            raise ValueError("use_dora and init 'pissa' both take the base's weights apart; use one of them")
        return self

    def served_as(self) -> ServedAs:
        return "model" if self.use_dora else "adapter"

    def why_uncut(self) -> str | None:
        return "use_dora takes the norm of whole columns of weights" if self.use_dora else None


class QLora(_Method):
    """LoRA over a frozen base in 4-bit NormalFloat, arXiv 2305.14314. Served merged: the adapter has learnt to correct the rounded base."""

    kind: Literal["qlora"] = "qlora"
    rank: Rank = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Share = 0.0
    targets: Targets = (ALL_LINEAR,)
    use_rslora: bool = False
    double_quantization: bool = True
    """Quantize the scales of the blocks too."""

    def why_uncut(self) -> str:
        return "a base in 4 bits is packed without regard to rows and columns"


class AdaLora(_Method):
    """AdaLoRA, arXiv 2303.10512: begins at `initial_rank` and moves ranks to the modules that need them, `rank` on average at the end.
    Served as a LoRA adapter."""

    kind: Literal["adalora"] = "adalora"
    rank: Rank = 8
    initial_rank: Rank = 12
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Share = 0.0
    targets: Targets = (ALL_LINEAR,)
    warmup: Share = 0.1
    """Share of the steps before ranks are first taken away."""
    settled: Share = 0.3
    """Share of the steps at the end with the ranks as they are."""
    every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two reallocations."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps the singular vectors orthogonal."""

    @model_validator(mode="after")
    def _ranks_shrink(self) -> "AdaLora":
        if self.initial_rank <= self.rank:
            raise ValueError(
                f"initial_rank is {self.initial_rank}, not above rank {self.rank}: ranks are taken away, never added; raise it"
            )
        if self.warmup + self.settled >= 1:
            raise ValueError(f"warmup {self.warmup} and settled {self.settled} leave no steps to reallocate ranks in; lower one")
        return self

    def served_as(self) -> ServedAs:
        return "adapter"


class PrefixTuning(_Method):
    """Learnt keys and values before every layer's own, arXiv 2101.00190."""

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    projection_size: Annotated[int, Field(ge=1)] | None = None
    """Width of the network that makes the prefix from smaller embeddings; None learns keys and values themselves."""

    def served_as(self) -> None:
        return None

    def why_unserved(self) -> str:
        return "vLLM has no way to give a request learnt keys and values of its own"


class PromptTuning(_Method):
    """Learnt embeddings before the first token, arXiv 2104.08691."""

    kind: Literal["prompt"] = "prompt"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    init_text: str | None = None
    """Text whose embeddings the virtual tokens begin with, repeated or cut to their number; None: random rows of the embedding matrix."""

    def served_as(self) -> None:
        return None

    def why_unserved(self) -> str:
        return "the engine would have to put the learnt embeddings before every request's tokens, which its adapters cannot"

    def why_uncut(self) -> None:
        return None


class IA3(_Method):
    """(IA)^3, arXiv 2205.05638: learnt scales of keys, values and the feed-forward's inner activations. Served merged."""

    kind: Literal["ia3"] = "ia3"
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear modules whose outputs are scaled; empty: keys and values."""
    feedforward: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear modules whose inputs are scaled; empty: the feed-forward's last."""


class Bottleneck(_Method):
    """Bottleneck adapters: down, activation, up, added to a sublayer's output. `houlsby` (arXiv 1902.00751): after attention and
    feed-forward; `pfeiffer` (arXiv 2005.00247): after the feed-forward alone."""

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    reduction: Annotated[float, Field(gt=1)] = 16.0
    """Width of the model over the width of the bottleneck."""
    activation: Literal["relu", "gelu", "silu"] = "relu"

    def served_as(self) -> None:
        return None

    def why_unserved(self) -> str:
        return "a network with a bend after a sublayer cannot be folded into weights, and vLLM has no such layer"


class LlamaAdapter(_Method):
    """LLaMA-Adapter, arXiv 2303.16199: learnt prompts in the top layers' attention, behind a gate that begins at zero."""

    kind: Literal["llama-adapter"] = "llama-adapter"
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 10
    num_layers: Annotated[int, Field(ge=1)] | None = None
    """Layers, from the top, that get prompts; None: all but the first two."""

    def served_as(self) -> None:
        return None

    def why_unserved(self) -> str:
        return "vLLM's attention has no gated prompt"


class Full(_Method):
    """Every weight is trained. Served as a checkpoint of its own."""

    kind: Literal["full"] = "full"

    def why_uncut(self) -> None:
        return None


def _kind(value: Any) -> str:
    """LoRA where a contract names no kind."""
    return str(value.get("kind", "lora") if isinstance(value, dict) else getattr(value, "kind", "lora"))


Method = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[QLora, Tag("qlora")]
    | Annotated[AdaLora, Tag("adalora")]
    | Annotated[PrefixTuning, Tag("prefix")]
    | Annotated[PromptTuning, Tag("prompt")]
    | Annotated[IA3, Tag("ia3")]
    | Annotated[Bottleneck, Tag("bottleneck")]
    | Annotated[LlamaAdapter, Tag("llama-adapter")]
    | Annotated[Full, Tag("full")],
    Discriminator(_kind),
]
