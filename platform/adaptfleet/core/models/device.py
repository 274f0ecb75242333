"""Where a model runs and in which type: the one place that knows devices apart."""

from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from adaptfleet.contracts.model import ModelSpec


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets as Linux names them, such as `avx512_bf16`."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    line = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def computes_bfloat16_fast() -> bool:
    """GPUs do; CPUs with AMX or AVX512-BF16 do. With AVX512 alone bfloat16 products are several times slower than float32's."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def model_dtype(spec: ModelSpec) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if computes_bfloat16_fast() else torch.float32
    return torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32


def memory_per_worker(workers_here: int) -> int:
    """Bytes that one worker may use: the same number for every worker, that of the one with least."""
    own = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total // workers_here
    if not dist.is_initialized():
        return own
    least = torch.tensor(own, dtype=torch.int64, device=device())
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
