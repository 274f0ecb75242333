"""Makes `.venv` from a lock with pip and venv only: `python3.11 requirements/install.py [cpu|gpu]`, which `make setup` runs.

Standard library only: nothing else is there yet. Run again, it does nothing until the lock, this file or the project's metadata changes.
"""

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "adaptfleet-setup"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 7 * 2**30
STREAMS = 2
"""pip commands side by side: one unpacks while another waits for the network."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", choices=["cpu", "gpu"], default="cpu")
    build = parser.parse_args().build
    _check_python()
    lock = ROOT / "requirements" / f"{build}.lock"
    stamp = _stamp(lock)
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == stamp:
        print(f"setup: {ENVIRONMENT.name} is as {lock.name} says; nothing to do.")
        return
    started = time.monotonic()
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES and not ENVIRONMENT.exists():
        _fail(f"{free / 2**30:.1f} GiB are free on the disk of {ROOT}; the environment needs about {NEEDED_BYTES / 2**30:.0f} GiB.")
    packages = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    print(f"setup: {ENVIRONMENT.name} with the {len(packages)} packages of requirements/{lock.name}. This takes a few minutes.", flush=True)
    python = _environment()
    STAMP.unlink(missing_ok=True)
    torch = [package for package in packages if package.startswith("torch==")]
    others = [package for package in packages if package not in torch]
    _install(python, [(torch, _torch_source(python, torch[0])), *((others[i::STREAMS], []) for i in range(STREAMS))], len(packages))
    # The metadata of the project itself; its modules stay where they are, so that an edit takes effect at once.
    _run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    _compile(python)
    STAMP.write_text(stamp, encoding="utf-8")
    print(f"setup: done in {time.monotonic() - started:.0f} s. Next: `make quickstart`, or `{ENVIRONMENT.name}/bin/adaptfleet doctor`.")


def _fail(message: str) -> None:
    sys.exit(f"setup: {message}")


def _check_python() -> None:
    if sys.version_info[:2] != (3, 11):
        _fail(
            f"this is Python {platform.python_version()} ({sys.executable}), but the locked packages are for Python 3.11. "
            f"Install it (Debian, Ubuntu: `apt install python3.11 python3.11-venv`; or from python.org, pyenv, conda) and run "
            f"`make setup PYTHON=/path/to/python3.11`."
        )
    if sys.platform != "linux":
        _fail(f"this is {sys.platform}, but the locked packages are for Linux. Use a Linux machine, a container or WSL 2.")


def _stamp(lock: Path) -> str:
    """Changes when anything that set-up depends on does."""
    parts = [sys.version, str(ROOT), lock.name]
    parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in (lock, ROOT / "pyproject.toml", Path(__file__))]
    return "\n".join(parts) + "\n"


def _environment() -> str:
    python = ENVIRONMENT / "bin" / "python"
    works = python.exists() and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode
    if not works:
        try:
            venv.create(ENVIRONMENT, with_pip=True, clear=ENVIRONMENT.exists(), symlinks=True)
        except (subprocess.CalledProcessError, ImportError) as error:
            _fail(f"Python cannot make a virtual environment ({error}). Debian, Ubuntu: `apt install python3.11-venv`, then run it again.")
    return str(python)


def _torch_source(python: str, requirement: str) -> list[str]:
    """Options for pip: none where its configured sources have this very build."""
    if "+cpu" not in requirement:
        return []
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", requirement]
    if not subprocess.run(command, capture_output=True, check=False).returncode:
        return []
    print(f"setup: pip's configured sources have no {requirement}; it comes from PyTorch's index of CPU builds.", flush=True)
    return ["--index-url", TORCH_CPU_INDEX]


def _install(python: str, parts: list[tuple[list[str], list[str]]], num_packages: int) -> None:
    """Installs the parts side by side; dependencies are not followed, so no two of them touch the same package."""
    started = time.monotonic()
    site = next((ENVIRONMENT / "lib").glob("python3*/site-packages"))
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for number, (packages, options) in enumerate(parts):
            wanted, log = Path(scratch) / f"{number}.txt", Path(scratch) / f"{number}.log"
            wanted.write_text("\n".join(packages) + "\n", encoding="utf-8")
            # All are compiled together at the end, on all cores.
            command = [python, "-m", "pip", "install", "--no-deps", "--no-compile", "--progress-bar=off", *options, "-r", str(wanted)]
            with log.open("wb") as handle:
                running.append((subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT), log))
        shown = 0.0
        try:
            while any(process.poll() is None for process, _ in running):
                time.sleep(0.5)
                if time.monotonic() - shown >= 10:
                    shown = time.monotonic()
                    fetched = sum(text.count(b"Collecting ") for text in (log.read_bytes() for _, log in running))
                    installed = sum(1 for _ in site.glob("*.dist-info"))
                    print(
                        f"setup: {time.monotonic() - started:4.0f} s  {fetched} of {num_packages} found, {installed} installed", flush=True
                    )
        except BaseException:
            for process, _ in running:
                process.terminate()
            raise
        for process, log in running:
            if process.returncode:
                tail = [line for line in log.read_text(errors="replace").splitlines() if "is ignored: it is neither" not in line][-15:]
                _fail("pip failed:\n" + "\n".join(f"  {line}" for line in tail) + "\nRun `make setup` again: what is installed stays.")


def _compile(python: str) -> None:
    """Bytecode of the libraries. Left to the first import it may never be written: containers tend to set PYTHONDONTWRITEBYTECODE, and then
    every worker that Ray starts would compile five thousand modules anew, ten seconds of a core. What does not compile is never imported.
    """
    site = next((ENVIRONMENT / "lib").glob("python3*/site-packages"))
    print("setup: compiling the libraries' modules ...", flush=True)
    command = [python, "-m", "compileall", "-qq", "-j", "0", "-x", r"/(tests?|testing)/", str(site)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _fail(f"`{' '.join(command)}` failed:\n{(done.stdout + done.stderr)[-2000:]}")


if __name__ == "__main__":
    main()
