"""The base of every contract."""

import hashlib
import json

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen, strict spec: an unknown key, a wrong type or an impossible combination is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of the spec as canonical JSON: equal specs have equal fingerprints."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
