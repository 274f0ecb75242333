"""The folder of a run: everything that explains it, and what its workers read.

contract.json      the resolved contract
rows/              the token files (links to the cache), which of their rows are trained on and held out (train.npy, test.npy), the plan of
                   all steps (plan-*.npy), and the held-out rows to answer (test.jsonl); of a teacher of another tokenizer its tokens too
segment.json       of a run that trains a part of its plan: from which checkpoint, and up to which step
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
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob, stored_job
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.rows import read_rows
from adaptfleet.core.data.tokens import Rows, TokenFile
from adaptfleet.core.steps import StepPlan, load_plan


@dataclass(frozen=True)
class Segment:
    """The part of a plan that a run trains."""

    until: int
    """The step that it ends with, the plan's last at most."""
    checkpoint: str | None
    """Of another run: weights, optimizer and step to begin with. None: it begins at step 0."""


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, job: FinetuneJob) -> "RunFolder":
        """Makes the job's folder or takes it up again; TrainingError if it belongs to another contract."""
        folder = cls(home() / "runs" / job.run_name())
        contract = folder.path / "contract.json"
        if contract.exists():
            earlier = stored_job(contract.read_text())
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

    def write_rows(self, train: Rows, test: Rows, plan: StepPlan, examples: Sequence[Example], teachers: Rows | None = None) -> None:
        """What the workers train on and measure. The token files are links to the cache, so that clearing it takes nothing from a run.

        `teachers`: the training rows under the same numbers, in the tokens of a teacher of another tokenizer.
        """
        target = self.path / "rows"
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rows-", dir=self.path) as folder:
            unfinished = Path(folder)
            for part, rows in (("files", train), ("teacher_files", teachers)):
                names = []
                for number, tokens in enumerate(rows.files if rows else ()):
                    names.append(f"{part}-{number:03}-{tokens.file.parent.name}.arrow")
                    _link(tokens.file, unfinished / names[-1])
                (unfinished / f"{part}.json").write_text(json.dumps(names))
            np.save(unfinished / "train.npy", train.order_N)
            np.save(unfinished / "test.npy", test.order_N)
            plan.save(unfinished)
            lines = [json.dumps(example.as_row(), ensure_ascii=False) + "\n" for example in examples]
            (unfinished / "test.jsonl").write_text("".join(lines), encoding="utf-8")
            for file in unfinished.iterdir():
                file.replace(target / file.name)

    def read_rows(self, part: str, files: str = "files") -> Rows:
        """Mapped into memory. `files`: `teacher_files` for the tokens of a teacher of another tokenizer."""
        folder = self.path / "rows"
        names = json.loads((folder / f"{files}.json").read_text())
        return Rows([TokenFile(folder / name) for name in names], np.load(folder / f"{part}.npy", mmap_mode="r"))

    def read_plan(self) -> StepPlan:
        return load_plan(self.path / "rows")

    def read_examples(self) -> list[Example]:
        """The held-out rows to answer."""
        file = self.path / "rows" / "test.jsonl"
        return read_rows(file) if file.stat().st_size else []

    def write_segment(self, segment: Segment) -> None:
        self.write_json("segment.json", asdict(segment))

    def read_segment(self) -> Segment | None:
        """None: the run trains its whole plan."""
        found = self.read_json("segment.json")
        return Segment(**found) if found else None

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


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, target)
