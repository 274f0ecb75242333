"""How weights are rounded, and what serves the result."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adaptfleet.contracts.base import Spec

Target = Literal["cpu", "ampere", "ada", "hopper", "blackwell"]
"""Where the result is served: vLLM's CPU build, or a generation of NVIDIA GPUs."""
GroupSize = Literal[32, 64, 128]


class W8A8(Spec):
    """8-bit integer weights, a scale for each output channel, and 8-bit activations."""

    kind: Literal["w8a8"] = "w8a8"
    activations: Literal["dynamic", "static"] = "dynamic"
    """`dynamic`: a scale for each token, found while serving. `static`: one scale a layer, found on the calibration data."""
    smoothquant: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Strength with which the activations' outliers are moved into the weights, arXiv 2211.10438; 0.5 is its authors'. None: not at all."""
    algorithm: Literal["rtn", "gptq"] = "rtn"

    @property
    def moves_scales(self) -> bool:
        """Between a layer's inputs and its weights, so that adapters of the parent, which read the same inputs, do not fit."""
        return self.smoothquant is not None

    @property
    def needs_data(self) -> bool:
        return self.activations == "static" or self.smoothquant is not None or self.algorithm != "rtn"

    def why_unserved(self, target: Target) -> str | None:
        return "vLLM has no 8-bit integer kernel for blackwell; use fp8" if target == "blackwell" else None


class WeightOnly(Spec):
    """Integer weights in groups along the inputs, 16-bit activations."""

    kind: Literal["weight-only"] = "weight-only"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = 32
    """Inputs that share a scale; must divide each layer's inputs."""
    symmetric: bool = True
    """False: a zero point for each group too."""
    algorithm: Literal["rtn", "gptq", "awq"] = "rtn"
    """Round to nearest; GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978."""

    @property
    def moves_scales(self) -> bool:
        return self.algorithm == "awq"

    @property
    def needs_data(self) -> bool:
        return self.algorithm != "rtn"

    def why_unserved(self, target: Target) -> str | None:
        if target == "cpu" and self.bits != 4:
            return f"bits is {self.bits}, but vLLM's CPU kernel takes 4-bit weights alone; allowed: bits 4, or kind w8a8 for 8 bits"
        if self.bits in (2, 3):
            return f"bits is {self.bits}, for which vLLM has no fast kernel on {target}; allowed: bits 4 and 8"
        return None


class Fp8(Spec):
    """8-bit floating-point weights, a scale for each output channel, and activations with a scale for each token."""

    kind: Literal["fp8"] = "fp8"

    @property
    def moves_scales(self) -> bool:
        return False

    @property
    def needs_data(self) -> bool:
        return False

    def why_unserved(self, target: Target) -> str | None:
        return None


class Mixed(Spec):
    """4-bit weights where they do least harm and 8-bit weights elsewhere: the harm of each layer is measured, and a knapsack chooses."""

    kind: Literal["mixed"] = "mixed"
    max_bytes_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Bytes of the checkpoint over those of the model that the recipe begins with."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """The same as a number."""
    group_size: GroupSize = 32
    algorithm: Literal["rtn", "gptq"] = "rtn"

    @model_validator(mode="after")
    def _one_budget(self) -> "Mixed":
        if (self.max_bytes is None) == (self.max_bytes_ratio is None):
            raise ValueError("give one of max_bytes_ratio and max_bytes: it is what the knapsack fills")
        return self

    @property
    def moves_scales(self) -> bool:
        return False

    @property
    def needs_data(self) -> bool:
        return True

    def why_unserved(self, target: Target) -> str | None:
        return "vLLM has no 8-bit integer kernel for blackwell, so w8a8 layers cannot be mixed in" if target == "blackwell" else None


Scheme = Annotated[W8A8 | WeightOnly | Fp8 | Mixed, Field(discriminator="kind")]
