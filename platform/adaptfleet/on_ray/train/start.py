"""Where a worker begins: light to import, so that what is heavy is imported in the quickest way. A lost worker costs that time."""

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

HIDDEN = "bitsandbytes"


def train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker; `config` is what `worker.train` takes."""
    put_other_threads_behind()
    imported(config["needs_bitsandbytes"])(config)


def put_other_threads_behind() -> None:
    """Of this process: Ray's thirty take a hundredth of a core and wake up hundreds of times a second, each time in the place of the thread
    that trains. With Linux's SCHED_BATCH they have the same share, at that thread's next pause. Threads it starts itself are not touched.
    """
    if sys.platform != "linux":
        return
    for thread in [int(entry.name) for entry in Path("/proc/self/task").iterdir()]:
        if thread != threading.get_native_id():
            # one that has ended since, or a container that forbids it: nothing depends on it
            with contextlib.suppress(OSError):
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def imported(needs_bitsandbytes: bool) -> Callable[[dict[str, Any]], None]:
    """`worker.train` and the five thousand modules it needs.

    The garbage collector would look again and again at objects that all stay: without it they come in a fifth less time. And peft imports
    bitsandbytes wherever it is installed (peft/helpers.py), which brings PyTorch's compiler along: two seconds, for weights in 4 or 8 bits
    alone. For other runs it counts as not installed in this process; to go once peft imports it where it is used.
    """
    if not needs_bitsandbytes:
        sys.modules.setdefault(HIDDEN, cast(ModuleType, None))  # what Python takes for "there is none"
    gc.disable()
    try:
        from adaptfleet.on_ray.train.worker import train
    finally:
        gc.enable()
    gc.freeze()
    return train
