"""The same few held-out rows answered before and after training: what a run has changed, for a reader's eye."""

from dataclasses import dataclass

from adaptfleet.core.data.examples import Example
from adaptfleet.on_ray.train.run_folder import RunFolder

_FILE = "samples.json"


@dataclass(frozen=True)
class Sample:
    prompt: list[dict[str, str]]
    expected: str
    before: str
    after: str | None
    """None until the run has ended."""


def write_before(folder: RunFolder, examples: list[Example], answers: list[str]) -> None:
    """What the untrained model answers, written once at the start; a resumed run keeps it."""
    rows = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in example.prompt],
            "expected": example.answer,
            "before": answer,
            "after": None,
        }
        for example, answer in zip(examples, answers, strict=True)
    ]
    folder.write_json(_FILE, rows)


def write_after(folder: RunFolder, answers: list[str]) -> None:
    rows = [row | {"after": answer} for row, answer in zip(folder.read_json(_FILE) or [], answers, strict=True)]
    folder.write_json(_FILE, rows)


def read_samples(folder: RunFolder) -> list[Sample]:
    return [Sample(**row) for row in folder.read_json(_FILE) or []]
