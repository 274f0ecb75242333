"""What an artifact says of itself: its manifest."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.names import SafeName

ArtifactKind = Literal["adapter", "model", "dataset"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(Spec):
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class Draft(Spec):
    """What a publisher knows; the registry adds version, files and time."""

    kind: ArtifactKind
    name: SafeName
    base: str | None = None
    """Adapters: the base's id, such as `smollm2-135m`."""
    base_revision: str | None = None
    """Adapters: the base's content hash. An adapter is served only on the base it was trained on."""
    method: dict[str, Any] | None = None
    """Adapters: the method's resolved contract, `kind` and `rank` among it."""
    serves_adapters_of: Sha256 | None = None
    """Models: the content hash of the base whose adapters this model serves too, as it is that base with rounded weights."""
    parents: tuple[str, ...] = Field(default=(), strict=False)
    """Lineage: references, with versions, of what this was made from."""
    contract_fingerprint: str | None = None
    metrics: dict[str, float] = {}
    libraries: dict[str, str] = {}


class Manifest(Draft):
    version: Annotated[int, Field(ge=1)]
    files: dict[str, FileEntry]
    created_at: Annotated[datetime, Field(strict=False)]

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"
