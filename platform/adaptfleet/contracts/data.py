"""Which examples."""

from typing import Annotated

from pydantic import Field, model_validator

from adaptfleet.contracts.base import Spec

EMBEDDED_DATASETS = ("address-json", "name-json")


class DataSpec(Spec):
    """Rows are `messages` (OpenAI's chat format), `prompt` and `completion`, or `text`."""

    train: str = "address-json"
    """An embedded data set, a published data set's `name@version`, or a `.jsonl` or `.parquet` file."""
    test: str | None = None
    """A file of held-out rows. None: the embedded set's own held-out part, or `test_fraction` of the rows."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out, chosen by a hash of each row's prompt, so that equal prompts never stand on both sides."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """At most so many training rows, the first in the seeded order. None: all."""
    seed: int = 0

    @model_validator(mode="after")
    def _test_needs_a_file(self) -> "DataSpec":
        if self.test is not None and self.train in EMBEDDED_DATASETS:
            raise ValueError(f"test is {self.test!r}, but {self.train!r} has a held-out part of its own; leave test out")
        if self.test_fraction != 0.1 and (self.test is not None or self.train in EMBEDDED_DATASETS):
            raise ValueError("test_fraction is given, but the held-out rows are given too, so it would do nothing; leave it out")
        return self
