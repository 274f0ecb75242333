"""Writes a lock from what is asked for: `python requirements/lock.py cpu` makes cpu.lock of cpu.in, `... gpu` makes gpu.lock of gpu.in.

Needs Python 3.11, the version the locks are for, and the network; installs nothing. Only metadata is read, so the CUDA lock can be made on
a machine without a GPU. A package named in a `leave-out:` comment stays out, whoever requires it: the package that requires it is then
replaced, in the resolution, by its other requirements.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PYTHON = (3, 11)
HEADER = "# {what}\n# Made from {name}.in by `python requirements/lock.py {name}`; installed with --no-deps.\n"
WHAT = {
    "cpu": "Everything the platform, its tests and its benchmarks use, CPU build.",
    "gpu": "The same for CUDA 13. Resolved from metadata; not installed in CI, which has no GPU.",
}
# The CPU build of torch, for machines whose package index has only the CUDA one.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(WHAT))
    name = parser.parse_args().name
    if sys.version_info[:2] != PYTHON:
        sys.exit(f"this is Python {sys.version_info[0]}.{sys.version_info[1]}; the locks are for 3.11. Run it with python3.11.")
    wanted, left_out = read_wanted(FOLDER / f"{name}.in")
    with tempfile.TemporaryDirectory() as scratch:
        python = _newest_pip(Path(scratch))
        replaced: dict[str, str] = {}
        if left_out:
            # Only a package pinned right here may be one that requires a left-out one.
            for requirement in [r for r in wanted if _project(r).startswith("vllm")]:
                package = resolve(python, [requirement], ["--no-deps"])[0]
                wanted.remove(requirement)
                wanted += [r for r in package["metadata"].get("requires_dist", []) if "extra ==" not in r and _project(r) not in left_out]
                replaced[_project(requirement)] = package["metadata"]["version"]
        locked = {_project(p["metadata"]["name"]): p["metadata"]["version"] for p in resolve(python, wanted)}
    broken = sorted(left_out & set(locked))
    if broken:
        sys.exit(f"{', '.join(broken)} should be left out, but another package requires it.")
    lines = sorted(f"{project}=={version}" for project, version in {**locked, **replaced}.items())
    target = FOLDER / f"{name}.lock"
    target.write_text(HEADER.format(what=WHAT[name], name=name) + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{target.relative_to(FOLDER.parent)}: {len(lines)} packages")


def read_wanted(file: Path) -> tuple[list[str], set[str]]:
    """Requirements of the file and of those it includes with `-r`, and the packages to leave out."""
    wanted: list[str] = []
    left_out: set[str] = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"#\s*leave-out:(.*)", line):
            left_out |= {_project(name) for name in found[1].split()}
        elif line.startswith("-r "):
            inner, inner_left_out = read_wanted(file.parent / line[3:].strip())
            wanted += inner
            left_out |= inner_left_out
        elif line.strip() and not line.startswith("#"):
            wanted.append(line.strip())
    return wanted, left_out


def _project(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def _newest_pip(scratch: Path) -> Path:
    """Older pips download every wheel even for a dry run."""
    venv.create(scratch / "venv", with_pip=True)
    python = scratch / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    return python


def resolve(python: Path, requirements: list[str], options: list[str] | None = None) -> list[dict]:
    """pip's own resolution: one entry a package, with its metadata."""
    with tempfile.TemporaryDirectory() as scratch:
        report, asked = Path(scratch) / "report.json", Path(scratch) / "asked.txt"
        asked.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report, "-r", asked]
        done = subprocess.run([*command, *(options or [])], check=False)
        if done.returncode and any("+cpu" in requirement for requirement in requirements):
            # Second, not first: where it is out of reach, pip tries it again for each of hundreds of packages.
            done = subprocess.run([*command, "--extra-index-url", TORCH_CPU_INDEX, *(options or [])], check=False)
        if done.returncode:
            sys.exit("pip could not resolve these requirements; its reasons stand above.")
        return json.loads(report.read_text(encoding="utf-8"))["install"]


if __name__ == "__main__":
    main()
