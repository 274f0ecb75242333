"""What training is for: one variant of the union an objective."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.distillation import Distillation


class Sft(Spec):
    """Supervised fine-tuning: the cross-entropy of the answers."""

    kind: Literal["sft"] = "sft"


class Dpo(Spec):
    """Direct preference optimization, arXiv 2305.18290, on rows of `prompt`, `chosen` and `rejected`. The reference is the base itself, the
    method switched off: it needs no memory of its own."""

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dear it is to move away from the base."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the preferences believed to be the wrong way round (section 3 of arXiv 2310.12036's conservative DPO)."""


class Orpo(Spec):
    """Odds ratio preference optimization, arXiv 2403.07691, on the same rows: the chosen answer's cross-entropy and a term that prefers it.
    Needs no reference."""

    kind: Literal["orpo"] = "orpo"
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of the term that prefers; lambda in the paper."""


def _kind(value: Any) -> str:
    return str(value.get("kind", "sft") if isinstance(value, dict) else getattr(value, "kind", "sft"))


Objective = Annotated[
    Annotated[Sft, Tag("sft")] | Annotated[Dpo, Tag("dpo")] | Annotated[Orpo, Tag("orpo")] | Annotated[Distillation, Tag("distill")],
    Discriminator(_kind),
]
