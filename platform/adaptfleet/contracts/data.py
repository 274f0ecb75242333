"""Which examples."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from adaptfleet.contracts.base import Spec

EMBEDDED_DATASETS = ("address-json", "name-json")


class MixtureSource(Spec):
    source: str
    """As in `data.train`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """This source's share of an epoch's examples is its weight by the sum of all weights."""


class DataSpec(Spec):
    """Rows are `messages` (OpenAI's chat format), `prompt` and `completion`, or `text`."""

    train: str | None = "address-json"
    """An embedded data set, a published data set's `name@version`, a `.jsonl` or `.parquet` file, a folder of such files or one saved by
    `save_to_disk`, or a `file://`, `s3://`, `gs://` or `az://` URL of one of these. None: the mixture."""
    mixture: Annotated[tuple[MixtureSource, ...], Field(strict=False)] | None = None
    """Several sources instead of `train`. An epoch has as many examples as all of them have rows; small sources repeat."""
    test: str | None = None
    """Held-out rows: a file, folder or URL. None: each source's own held-out part, or `test_fraction` of its rows where it has none."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out, chosen by a hash of each row's prompt, so that equal prompts never stand on both sides."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """At most so many training rows of each source, the first in the seeded order. None: all."""
    preprocess: Literal["auto", "local", "ray"] = "auto"
    """Where rows become tokens: in the job's own process, or in parallel on the cluster. `auto`: on the cluster above 50,000 rows."""
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _mixture_stands_for_train(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mixture") is not None and "train" not in values:
            return {**values, "train": None}
        return values

    @model_validator(mode="after")
    def _either_train_or_mixture(self) -> "DataSpec":
        if self.train is not None and self.mixture is not None:
            raise ValueError(f"train is {self.train!r} and a mixture is given too; give one of them (train may be a source of the mixture)")
        if self.train is None and not self.mixture:
            raise ValueError("neither train nor a mixture of at least one source is given; give one of them")
        names = [entry.source for entry in self.mixture or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the mixture names {', '.join(map(repr, twice))} more than once; name it once and add up the weights")
        return self

    @model_validator(mode="after")
    def _test_needs_a_file(self) -> "DataSpec":
        embedded = [entry.source for entry in self.sources() if entry.source in EMBEDDED_DATASETS]
        if self.test is not None and self.train in EMBEDDED_DATASETS:
            raise ValueError(f"test is {self.test!r}, but {self.train!r} has a held-out part of its own; leave test out")
        if self.test_fraction != 0.1 and (self.test is not None or len(embedded) == len(self.sources())):
            raise ValueError("test_fraction is given, but the held-out rows are given too, so it would do nothing; leave it out")
        return self

    def sources(self) -> tuple[MixtureSource, ...]:
        """What is trained on: the mixture's sources, or `train` alone."""
        return self.mixture or (MixtureSource(source=self.train or ""),)

    def name(self) -> str:
        """For messages and reports."""
        return ", ".join(entry.source for entry in self.sources())
