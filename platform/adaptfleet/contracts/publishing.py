"""What `jobs/publish.py` and `adaptfleet publish` do: publish a folder that was made elsewhere."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adaptfleet.contracts.artifacts import ArtifactKind
from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.names import DEFAULT_ALIAS, SafeName


class PublishJob(Spec):
    job: Literal["publish"] = "publish"
    kind: ArtifactKind
    """`adapter` (PEFT LoRA), `model` (a checkpoint in Hugging Face's format) or `dataset` (`.jsonl` or `.parquet` files)."""
    folder: str
    """The folder with the files. All of it is published, so it should hold nothing else."""
    name: SafeName
    alias: SafeName | None = DEFAULT_ALIAS
    """The alias moved to the new version; None moves none."""
    base: ModelSpec | None = None
    """Adapters: the base that the adapter was trained on. Its files are hashed, so that the adapter is served on no other."""
    parents: tuple[str, ...] = Field(default=(), strict=False)
    """Lineage: references, with versions, of what this was made from."""
    metrics: Annotated[dict[str, float], Field(strict=False)] = {}

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> "PublishJob":
        if self.kind == "adapter" and self.base is None:
            raise ValueError("base is missing: an adapter is served only on its base; write base: {source: smollm2-135m}")
        if self.kind != "adapter" and self.base is not None:
            raise ValueError(f"base is given, but a {self.kind} has none; leave base out")
        return self
