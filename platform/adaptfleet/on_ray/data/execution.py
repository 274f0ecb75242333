"""Where rows become tokens: here, or on the cluster by Ray Data. Both give the same token files, byte for byte."""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.core.data.encoding import Faults
from adaptfleet.core.data.token_cache import Encoder, Execute, Task, one_after_another
from adaptfleet.core.data.tokens import SCHEMA
from adaptfleet.on_ray.joining import connected

log = logging.getLogger(__name__)
LOCAL_ROWS = 50_000
"""Up to so many rows `auto` tokenises in the job's own process."""


def choose_execution(preprocess: Literal["auto", "local", "ray"], num_rows: int, join_cluster: Callable[[], None]) -> Execute:
    if preprocess == "local" or (preprocess == "auto" and num_rows <= LOCAL_ROWS):
        return one_after_another

    def on_cluster(encoder: Encoder, tasks: Sequence[Task]) -> Iterator[tuple[pa.RecordBatch, Faults]]:
        join_cluster()
        yield from on_ray_data(encoder, tasks)

    return on_cluster


def on_ray_data(encoder: Encoder, tasks: Sequence[Task]) -> Iterator[tuple[pa.RecordBatch, Faults]]:
    """The tasks on the cluster's free CPUs, their results in the tasks' order. The files must be seen by all nodes."""
    import ray
    import ray.data

    with connected():
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        log.info("tokenising %d spans of rows on the cluster's %d CPUs", len(tasks), num_cpus)
        shared = ray.put((encoder, list(tasks)))
        spans = ray.data.range(len(tasks), override_num_blocks=len(tasks))
        results = spans.map_batches(
            _Tokeniser,
            fn_constructor_args=(shared,),
            batch_size=1,
            num_cpus=1,
            concurrency=(1, min(num_cpus, len(tasks))),
        )
        for row in results.iter_rows():
            batch, faults = pickle.loads(row["result"])
            if isinstance(faults, AdaptfleetError):
                raise faults
            yield pa.ipc.read_record_batch(pa.py_buffer(batch), SCHEMA), faults


class _Tokeniser:
    """An actor that holds the tokenizer. A result is bytes: Ray Data's own tables would not keep the batches as they are."""

    def __init__(self, shared: Any) -> None:
        import ray

        # Each actor has one CPU; the tokenizer would start a thread for every core of the machine.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.encoder, self.tasks = ray.get(shared)

    def __call__(self, rows: dict[str, np.ndarray]) -> Iterator[dict[str, list[bytes]]]:
        for number in rows["id"].tolist():
            try:
                for batch, faults in self.encoder.encode(self.tasks[number]):
                    yield {"result": [pickle.dumps((batch.serialize().to_pybytes(), faults))]}
            except AdaptfleetError as error:
                yield {"result": [pickle.dumps((b"", error))]}
