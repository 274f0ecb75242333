"""Which base model."""

from typing import Literal

from adaptfleet.contracts.base import Spec

EMBEDDED_MODELS = ("smollm2-135m",)


class ModelSpec(Spec):
    source: str = "smollm2-135m"
    """An embedded model's name, a folder in Hugging Face's format, a hub id such as `org/model`, or a published model's reference."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU and where the CPU computes it fast (AMX or AVX512-BF16), else float32."""
    trust_remote_code: bool = False
    """Runs the model repository's own Python. Only for sources you trust."""
