"""The teacher scores the training rows once, on the cluster, by Ray Data: what a killed scoring has written is not made again."""

import logging
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from adaptfleet.contracts.distillation import Distillation, Offline
from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.contracts.jobs import FinetuneJob, stored_job
from adaptfleet.core.distill.teacher_logits import LogitFiles, bytes_a_label, write_part
from adaptfleet.core.packed_forward import check_packable
from adaptfleet.on_ray.distill.teacher import load_teacher
from adaptfleet.on_ray.train.run_folder import RunFolder

log = logging.getLogger(__name__)


def score_rows(job: FinetuneJob, folder: RunFolder, cpus: int, gpus: float) -> None:
    """Writes the files that are missing. The run's folder holds the rows and says where the files lie."""
    spec, facts = job.objective, (folder.read_json("facts.json") or {})["teacher"]
    assert isinstance(spec, Distillation) and isinstance(spec.source, Offline)
    rows = folder.read_rows("train")
    files = LogitFiles(Path(facts["logits"]), len(rows), spec.source.rows_per_file)
    missing = files.missing()
    if not missing:
        log.info("the teacher's distributions of %d rows are in the cache (%s)", len(rows), files.folder.name)
        return
    num_labels = rows.num_labels
    files.check_room(num_labels, bytes_a_label(spec.source, facts["vocab_size"]))
    log.info("the teacher scores %d of %d files of rows; %d are there", len(missing), len(files), len(files) - len(missing))
    began, told = time.monotonic(), time.monotonic()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    parts = ray.data.range(len(missing), override_num_blocks=len(missing)).map_batches(
        _Scorer,
        fn_constructor_args=(job.model_dump_json(), str(folder.path), missing),
        batch_size=1,
        num_cpus=cpus,
        num_gpus=gpus,
        concurrency=(1, min(job.cluster.max_workers, len(missing))),
    )
    for done, row in enumerate(parts.iter_rows(), 1):
        error = pickle.loads(row["result"])
        if error is not None:
            raise error
        if time.monotonic() - told > 10:
            told = time.monotonic()
            log.info("the teacher has scored %d of %d files", done, len(missing))
    num_bytes = sum(files.file(part).stat().st_size for part in range(len(files)))
    log.info(
        "the teacher's distributions: %s bytes, %.0f a label, in %.1f s", f"{num_bytes:,}", num_bytes / num_labels, time.monotonic() - began
    )


class _Scorer:
    """An actor that holds the teacher."""

    def __init__(self, job: str, folder: str, parts: list[int]) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run, self.parts = RunFolder(Path(folder)), parts
        spec = stored_job(job).objective
        assert isinstance(spec, Distillation) and isinstance(spec.source, Offline)
        self.spec, self.source = spec, spec.source
        facts: dict[str, Any] = (run.read_json("facts.json") or {})["teacher"]
        self.rows = run.read_rows("train")
        self.files = LogitFiles(Path(facts["logits"]), len(self.rows), self.source.rows_per_file)
        self.sizes = (facts["vocab_size"], run.read_plan().pack_tokens)
        self.teacher = load_teacher(spec, facts["folder"])
        self.longest = int(self.rows.lengths.max())

    def __call__(self, rows: dict[str, np.ndarray]) -> Iterator[dict[str, list[bytes]]]:
        for number in rows["id"].tolist():
            error: AdaptfleetError | None = None
            try:
                if number == 0:
                    check_packable(self.teacher, *self.sizes, self.longest)
                write_part(self.files, self.parts[number], self.teacher, self.rows, self.spec, self.source, *self.sizes)
            except AdaptfleetError as raised:
                error = raised
            yield {"result": [pickle.dumps(error)]}
