"""For whom the catalog is read: which names exist for this caller, what they stand for, and which side of a canary the user is on."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field


def _everything(_: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Viewer:
    may_see: Callable[[str], bool] = _everything
    """Whether a model of this name, without version or alias, exists for the caller. What does not is answered as what never was."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names for models."""
    user: str = ""
    """Who stays on one side of a split: the request's user, or the key."""
    request_id: str = ""


EVERYBODY = Viewer()
viewer: ContextVar[Viewer] = ContextVar("adaptfleet_viewer", default=EVERYBODY)
"""Of the request that is being answered."""
