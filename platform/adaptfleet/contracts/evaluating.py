"""What `jobs/evaluate.py` runs, and the record that it leaves beside a version."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from adaptfleet.contracts.artifacts import Sha256
from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.model import ModelSpec

_PATH_BEGINS = ("/", "./", "../", "~/")


class BaseSubject(Spec):
    """The base alone: `model`, without an adapter."""

    kind: Literal["base"] = "base"

    def label(self) -> str:
        return "base"


class PublishedSubject(Spec):
    """An adapter or a model of the registry. An adapter is loaded on `model`, whose revision must be the one it was trained on."""

    kind: Literal["published"] = "published"
    reference: str
    """`name` (its alias prod), `name@3` or `name@canary`."""

    def label(self) -> str:
        return self.reference


class FolderSubject(Spec):
    """A checkpoint in Hugging Face's format or an adapter in PEFT's, on disk. An adapter is loaded on `model`."""

    kind: Literal["folder"] = "folder"
    path: str

    def label(self) -> str:
        return self.path


class EndpointSubject(Spec):
    """A model behind an OpenAI-compatible endpoint. It answers; its perplexity cannot be measured from outside."""

    kind: Literal["endpoint"] = "endpoint"
    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+")]
    """Such as `http://127.0.0.1:8000`; `/v1` is added where it is missing."""
    model: Annotated[str, Field(min_length=1)]
    """The model's id on the endpoint."""
    api_key_env: str | None = "ADAPTFLEET_API_KEY"
    """The environment variable that holds the key. None: the endpoint asks for none."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 32
    """Requests in flight."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """For one request."""

    def label(self) -> str:
        return f"{self.model} at {self.url}"


def _from_text(value: Any) -> Any:
    """The short forms: `base`, a path that begins with `/`, `./`, `../` or `~/`, and a reference."""
    if not isinstance(value, str):
        return value
    if value == "base":
        return {"kind": "base"}
    if value.startswith(_PATH_BEGINS):
        return {"kind": "folder", "path": value}
    return {"kind": "published", "reference": value}


Subject = Annotated[
    BaseSubject | PublishedSubject | FolderSubject | EndpointSubject, Field(discriminator="kind"), BeforeValidator(_from_text)
]


class LmEvalSpec(Spec):
    """Tasks of EleutherAI's evaluation harness, the package `lm-eval`. Local models alone."""

    tasks: Annotated[tuple[str, ...], Field(strict=False)]
    include_path: str | None = None
    """A folder with YAML files of your own tasks. The data that they name must be on this machine."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before each question. None: as the task says."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most so many rows of each task. None: all."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    apply_chat_template: bool = False

    @model_validator(mode="after")
    def _names_tasks(self) -> "LmEvalSpec":
        if not self.tasks:
            raise ValueError("tasks is empty; name one, such as `arc_easy`, or leave lm_eval out")
        return self


class EvaluateJob(Spec):
    job: Literal["evaluate"] = "evaluate"
    subjects: Annotated[tuple[Subject, ...], Field(strict=False)]
    """What is scored, all on the same rows: `base`, `name`, `name@3`, `name@canary`, a folder's path (`./...`), or
    `{kind: endpoint, url: ..., model: ...}`. From two on, each is compared with the first."""
    model: ModelSpec = ModelSpec()
    """The base of the subject `base` and of adapters."""
    data: DataSpec = DataSpec()
    """Its held-out rows are scored, in the seeded order in which a fine-tune takes them."""
    rows: str | None = None
    """A `.jsonl` or `.parquet` file all of whose rows are scored, in place of `data`."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """At most so many rows. None: all."""
    answers: bool = True
    """Answer the rows greedily and score the answers: exact match, field F1, valid JSON, ROUGE."""
    perplexity: bool = True
    """Measure the expected answers' perplexity. Endpoints are left out."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 192
    lm_eval: LmEvalSpec | None = None
    """Measure these tasks too, as metrics `lm_eval/TASK/METRIC`."""
    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    """Of the bootstrap behind each 95% interval, and permutations behind each p-value."""
    seed: int = 0
    """Of the resampling."""
    record: bool = True
    """Keep the result beside the version that it is of, where a promotion's requirements look."""

    @model_validator(mode="after")
    def _scores_something(self) -> "EvaluateJob":
        if not self.subjects:
            raise ValueError("subjects is empty, so nothing would be scored; name one, such as `base` or `address-json@3`")
        if not self.answers and not self.perplexity and self.lm_eval is None:
            raise ValueError("answers and perplexity are false and lm_eval is not given, so nothing would be measured; set one of them")
        if not self.answers and any(isinstance(subject, EndpointSubject) for subject in self.subjects):
            raise ValueError("answers is false, but an endpoint's perplexity cannot be measured; set answers or leave the endpoint out")
        if self.rows is not None and self.data != DataSpec():
            raise ValueError("rows and data are both given, but only one of them can be scored; leave one out")
        labels = [subject.label() for subject in self.subjects]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"subjects names {', '.join(twice)} more than once; name each once")
        return self


class MetricEstimate(Spec):
    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    num_rows: Annotated[int, Field(ge=1)]
    """Rows on which the metric is defined."""


class EvaluationRecord(Spec):
    """One evaluation of one published version. Created once and never changed; the newest counts."""

    reference: str
    """The version, `name@3`, whatever alias was asked for."""
    data: str
    """What the rows were taken from."""
    rows_sha256: Sha256
    """Of the scored rows, in order."""
    num_rows: Annotated[int, Field(ge=1)]
    metrics: dict[str, MetricEstimate]
    contract_fingerprint: str
    run: str
    """Name of the run's folder, which holds every row's answer and scores."""
    libraries: dict[str, str] = {}
    evaluated_at: Annotated[datetime, Field(strict=False)]
