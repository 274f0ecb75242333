"""Knowledge distillation: the student (`model`) learns the distribution that a teacher gives each next token."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.model import ModelSpec

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Online(Spec):
    """The teacher runs beside the student, on the same packed rows."""

    kind: Literal["online"] = "online"


class Offline(Spec):
    """The teacher runs once, on the cluster, over all training rows; its `k` most likely tokens and the mass of all others are kept on
    disk. The divergence is then between distributions over `k` tokens and one bucket for the rest."""

    kind: Literal["offline"] = "offline"
    k: Annotated[int, Field(ge=1)] = 64
    """Tokens kept of each distribution; those of the whole vocabulary where it has no more."""
    precision: Literal["float16", "float32"] = "float16"
    """Of the log probabilities on disk."""
    rows_per_file: Annotated[int, Field(ge=1)] = 512
    """What a killed scoring does again at most, for each of its workers."""


class OnPolicy(Spec):
    """The student answers a share of the prompts itself, and the teacher judges these answers: generalised knowledge distillation,
    arXiv 2306.13649."""

    kind: Literal["on_policy"] = "on_policy"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the rows whose answer the student writes; lambda in the paper. The others keep the data's answer."""
    every_steps: Annotated[int, Field(ge=1)] = 10
    """Answers of so many steps are written at once, with the weights of the first of them."""
    temperature: Weight = 1.0
    """Of the sampling; 0: greedy."""


class Alignment(Spec):
    """Layers of the student held to layers of the teacher. Needs both models in the same pass, so not `source.kind: offline`."""

    hidden: Weight = 0.0
    """Weight of the squared distance of hidden states over the square of the teacher's. Needs equal hidden widths."""
    attention: Weight = 0.0
    """Weight of KL(teacher || student) of the attention, averaged over the heads: the numbers of heads may differ."""
    layers: Annotated[dict[int, int], Field(min_length=1)] | None = None
    """Layer of the student: layer of the teacher, from 0. None: every layer of the student, spread evenly over the teacher's."""

    @model_validator(mode="after")
    def _layers_need_a_weight(self) -> "Alignment":
        if self.layers is not None and not self.is_on:
            raise ValueError("layers are given, but hidden and attention are both 0, so they would do nothing; give one a weight")
        return self

    @property
    def is_on(self) -> bool:
        return bool(self.hidden or self.attention)


def _kind(value: Any) -> str:
    return str(value.get("kind", "online") if isinstance(value, dict) else getattr(value, "kind", "online"))


Source = Annotated[
    Annotated[Online, Tag("online")] | Annotated[Offline, Tag("offline")] | Annotated[OnPolicy, Tag("on_policy")],
    Discriminator(_kind),
]


class Distillation(Spec):
    """loss = alpha T^2 D(teacher, student) + (1 - alpha) cross-entropy of the data's tokens + alignment, for each labelled token."""

    kind: Literal["distill"] = "distill"
    teacher: ModelSpec
    """Of the student's vocabulary, or of any where `unit` is `piece`. Frozen, and no part of what is saved."""
    unit: Literal["token", "piece"] = "token"
    """What a divergence is of. `token`: the distribution of the next token. `piece`: a piece of text that both tokenizers have, how likely
    it is and how likely any other; for a teacher of another tokenizer."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student), covers all that the teacher may say. `reverse_kl`: KL(student || teacher), keeps to what it
    most likely says. `jsd`: generalised Jensen-Shannon, between the two."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of `jsd` alone: beta KL(teacher || m) + (1 - beta) KL(student || m), where m = beta teacher + (1 - beta) student."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits of both (of a piece: its log probabilities) are divided by it. The divergence is multiplied by its square (of a piece: by it):
    gradients keep their size (arXiv 1503.02531)."""
    alpha: Share = 0.5
    """Share of the divergence; the rest is the hard labels'. An answer that the student wrote itself has no hard labels."""
    align: Alignment = Alignment()
    source: Source = Online()

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> "Distillation":
        if self.divergence != "jsd" and self.beta != 0.5:
            raise ValueError(f"beta is {self.beta}, but divergence {self.divergence!r} has none; leave it out, or use jsd")
        if self.alpha == 0 and not self.align.is_on:
            raise ValueError("alpha is 0 and nothing is aligned, so the teacher would do nothing; raise alpha, or use jobs/finetune.py")
        if self.unit == "piece" and self.align.is_on:
            raise ValueError(
                "align compares layers token by token, which models of two tokenizers do not share; set unit token, or align nothing"
            )
        if self.unit == "piece" and self.source.kind != "online":
            raise ValueError(f"source.kind {self.source.kind!r} is for a teacher of the student's tokenizer; with unit piece use online")
        if self.source.kind == "offline" and self.align.is_on:
            raise ValueError("align needs the teacher's layers, which source.kind 'offline' does not keep; use source.kind online")
        if self.source.kind == "on_policy" and self.alpha == 0:
            raise ValueError(
                "alpha is 0, so answers that the student writes would teach it nothing; raise alpha, or use source.kind online"
            )
        return self
