"""The folder of a run: everything that explains it, and what its workers read.

contract.json      the resolved contract
rows/              train.arrow, test.arrow (tokens and label masks), test.jsonl (rows)
facts.json         data hash, base revision, counts, library versions
metrics.jsonl      a line an update and an evaluation
tensorboard/       the same curves
samples.json       the same few held-out rows answered before and after training
report.html        all of it to look at, written at the end
progress.json      where the run stands now
failure.json       why it stopped, where the cause is the contract's or the data's
adapter/           the trained part, in peft's format
model/             the merged checkpoint, where that is what is published
checkpoint_*       Ray Train's checkpoints
"""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.rows import parse_row


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, job: FinetuneJob) -> "RunFolder":
        """Makes the job's folder or takes it up again; TrainingError if it belongs to another contract."""
        folder = cls(home() / "runs" / job.run_name())
        contract = folder.path / "contract.json"
        if contract.exists():
            earlier = FinetuneJob.model_validate_json(contract.read_text(), strict=False)
            if earlier.fingerprint() != job.fingerprint():
                raise TrainingError(
                    f"the run {job.run_name()!r} in {folder.path} was begun with another contract ({earlier.fingerprint()}, "
                    f"now {job.fingerprint()}). Leave `run` out, name another, or remove the folder."
                )
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_json("contract.json", job.model_dump(mode="json"))
        return folder

    def write_json(self, name: str, value: Any) -> None:
        unfinished = self.path / f".{name}.{os.getpid()}"
        unfinished.write_text(json.dumps(value, indent=1))
        unfinished.replace(self.path / name)

    def read_json(self, name: str) -> Any | None:
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def write_rows(self, part: str, rows: list[Encoded]) -> None:
        """Tokens and label masks as an Arrow file that workers map into memory."""
        table = pa.table(
            {
                "input_ids": pa.array([row.input_ids for row in rows], pa.list_(pa.int32())),
                "label_mask": pa.array([row.label_mask for row in rows], pa.list_(pa.bool_())),
            }
        )
        target = self.path / "rows" / f"{part}.arrow"
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        feather.write_feather(table, unfinished)
        unfinished.replace(target)

    def read_rows(self, part: str) -> list[Encoded]:
        table = feather.read_table(self.path / "rows" / f"{part}.arrow")
        return [Encoded(ids, mask) for ids, mask in zip(table["input_ids"].to_pylist(), table["label_mask"].to_pylist(), strict=True)]

    def write_examples(self, examples: list[Example]) -> None:
        lines = [json.dumps(example.as_row()) for example in examples]
        (self.path / "rows" / "test.jsonl").write_text("".join(line + "\n" for line in lines))

    def read_examples(self) -> list[Example]:
        return [parse_row(json.loads(line)) for line in (self.path / "rows" / "test.jsonl").read_text().splitlines()]

    def metrics(self, kind: str) -> list[dict[str, float]]:
        """The lines of a kind (`train`, `evaluation`) in `metrics.jsonl`, in the order of steps."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"
