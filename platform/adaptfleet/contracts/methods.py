"""How the model is adapted: one variant of the union a method."""

from typing import Annotated, Literal

from pydantic import Field

from adaptfleet.contracts.base import Spec

ALL_LINEAR = "all-linear"


class Lora(Spec):
    """LoRA, arXiv 2106.09685; with `use_rslora` the scale is alpha / sqrt(rank), arXiv 2312.03732."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = (ALL_LINEAR,)
    """Names of linear modules, such as `q_proj`; `all-linear`: every linear module but the output head."""
    use_rslora: bool = False


Method = Lora
"""A second variant makes this `Annotated[Lora | Other, Field(discriminator="kind")]`."""
