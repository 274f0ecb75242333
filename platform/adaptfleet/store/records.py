"""What lies where in the store. Every record is created once and never changed, so readers may keep what they have read.

index/NAME/versions/000001.json        a Publication: creating this record is the act of publishing, and claims the number for ever
index/NAME/removed/000001.json         marks the version as removed
index/NAME/aliases/ALIAS/000001.json   an AliasMove: the highest number is where the alias points now
index/NAME/splits/ALIAS/000001.json    an AliasSplit: the highest number holds as long as the alias has not moved since
evaluations/NAME/000001/000001.json    an EvaluationRecord of version 1; outside the index, which is listed often
content/NAME/UPLOAD/PATH               the files of one publication, written before its record
changes                                a token replaced after every change, which tells a polling reader to look again
"""

from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.errors import CorruptError
from adaptfleet.contracts.names import check_name

R = TypeVar("R", bound=Spec)
INDEX = "index"
CONTENT = "content"
EVALUATIONS = "evaluations"
CHANGES_KEY = "changes"


class Publication(Spec):
    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Names the folder under `content/NAME/` that holds the files."""
    manifest: Manifest


class AliasMove(Spec):
    version: Annotated[int, Field(ge=1)] | None
    """None: the alias was taken away."""
    earlier: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Where the alias pointed before, the latest last: `rollback` takes from the end."""
    moved_at: datetime
    move: str
    """A unique token, by which a writer whose answer was lost on the wire knows its own move again."""


class Share(Spec):
    version: Annotated[int, Field(ge=1)]
    weight: Annotated[float, Field(gt=0)]


class AliasSplit(Spec):
    """An alias that means several versions at once. Beside the alias's log, so that a reader who knows no splits sees the alias alone."""

    on_move: str
    """The token of the move it was made on. Any later move of the alias, by whomever, ends the split."""
    shares: tuple[Share, ...] = Field(default=(), strict=False)
    """Of requests, by weight; the alias's own version among them. Empty: all to the alias's own version."""
    shadow: Share | None = None
    """A version that gets copies of so many percent of the requests; its answers go nowhere."""
    made_at: datetime
    split: str
    """A unique token, by which a writer knows its own split again; users are dealt out anew for each alias, not for each split."""

    @property
    def versions(self) -> set[int]:
        return {share.version for share in self.shares} | ({self.shadow.version} if self.shadow else set())


class Removal(Spec):
    removed_at: datetime


def version_key(name: str, version: int) -> str:
    return f"{INDEX}/{check_name(name)}/versions/{version:06d}.json"


def removed_key(name: str, version: int) -> str:
    return f"{INDEX}/{check_name(name)}/removed/{version:06d}.json"


def alias_key(name: str, alias: str, number: int) -> str:
    return f"{INDEX}/{check_name(name)}/aliases/{check_name(alias)}/{number:06d}.json"


def split_key(name: str, alias: str, number: int) -> str:
    return f"{INDEX}/{check_name(name)}/splits/{check_name(alias)}/{number:06d}.json"


def index_prefix(name: str | None = None) -> str:
    return INDEX if name is None else f"{INDEX}/{check_name(name)}"


def content_prefix(name: str, upload: str | None = None) -> str:
    return f"{CONTENT}/{check_name(name)}" + (f"/{upload}" if upload else "")


def evaluations_prefix(name: str, version: int) -> str:
    return f"{EVALUATIONS}/{check_name(name)}/{version:06d}"


def evaluation_key(name: str, version: int, number: int) -> str:
    return f"{evaluations_prefix(name, version)}/{number:06d}.json"


def to_bytes(record: Spec) -> bytes:
    return record.model_dump_json(indent=1).encode()


def from_bytes(kind: type[R], key: str, content: bytes) -> R:
    """The record, or CorruptError naming its key."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the record"
        raise CorruptError(
            f"the store's record {key} is not what was written: {where}: {first['msg']}. Restore it from a backup, or remove the version "
            f"and publish again."
        ) from None
