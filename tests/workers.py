"""Workers of one test: real processes that meet over gloo and leave together."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT_S = 120
PRELOADED = ["adaptfleet.core.loop", "adaptfleet.core.methods.choice", "adaptfleet.core.sharding", "adaptfleet.core.distill.objective"]
"""What most workers import: once, by the process that they are forked from, which computes nothing and so has no threads."""


@contextmanager
def meeting(file: Path, rank: int, num_workers: int) -> Iterator[None]:
    """One thread each, and one process group when there are several."""
    torch.set_num_threads(1)
    if num_workers == 1:
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=num_workers)
    yield
    dist.barrier()  # gloo aborts a process whose peer hangs up while it still listens
    dist.destroy_process_group()


def run_workers(work: Callable, num_workers: int, *args: object) -> None:
    """`work(rank, *args)` in this process, or in several that must all end in time."""
    if num_workers == 1:
        work(0, *args)
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    processes = mp.start_processes(work, args=args, nprocs=num_workers, join=False, start_method="forkserver")
    assert processes is not None
    end = time.monotonic() + LIMIT_S
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            raise AssertionError(f"{num_workers} workers did not end within {LIMIT_S} s")
