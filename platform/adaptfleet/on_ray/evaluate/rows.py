"""Which rows are scored."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.evaluating import EvaluateJob
from adaptfleet.contracts.home import home
from adaptfleet.core.data.datasets import open_dataset
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.rows import read_rows
from adaptfleet.core.data.sample_order import epoch_order
from adaptfleet.store.registry import Registry


@dataclass(frozen=True)
class Rows:
    examples: list[Example]
    origin: str
    """What they were taken from, for a reader."""
    sha256: str
    """Of the scored rows, in order."""


def load_rows(job: EvaluateJob, registry: Registry) -> Rows:
    """The job's rows in the seeded order, so that the first few of a sorted file are a fair sample. DataError: none, or unusable ones."""
    if job.rows is not None:
        examples, origin, seed = read_rows(job.rows), job.rows, 0
    else:

        def fetch(reference: str) -> Path:
            return registry.fetch(registry.resolve(reference), home() / "cache" / "artifacts")

        index = open_dataset(job.data, fetch)
        examples, origin, seed = index.examples_at(index.test), job.data.test or job.data.name(), job.data.seed
        if not examples:
            raise DataError(f"no row of {job.data.name()!r} is held out; raise data.test_fraction, or give data.test or rows.")
    examples = [examples[i] for i in epoch_order(len(examples), seed, epoch=0)][: job.max_rows]
    if not job.perplexity and all(example.answer is None for example in examples):
        raise DataError(f"the rows of {origin!r} are plain texts, which have nothing to answer, and perplexity is false; set it.")
    return Rows(examples, origin, _sha256(examples))


def _sha256(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.as_row(), ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
