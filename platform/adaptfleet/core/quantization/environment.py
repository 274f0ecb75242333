"""The environment of llm-compressor, made once under ADAPTFLEET_HOME: its own few packages, ahead of the platform's.

Its metadata pins older versions of torch and transformers than vLLM wants, and vLLM's compressed-tensors must not be replaced; so neither
is installed over the other. Remove this module when one resolution satisfies both.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.contracts.home import home

LOCK = Path(__file__).resolve().parents[4] / "requirements" / "compression.lock"
_INSTALL_TIMEOUT_S = 900


def quantizer_python() -> Path:
    """The environment's interpreter; made at the first call, by one of several processes that ask at once.

    AdaptfleetError: the lock is not there, or pip cannot install it, with pip's reason.
    """
    if not LOCK.is_file():
        raise AdaptfleetError(f"{LOCK} is not there: llm-compressor's packages are pinned in it. Use a checkout of the repository.")
    shared = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    state = "\n".join([sys.version, *shared, LOCK.read_text(encoding="utf-8")])
    folder = home() / "environments" / f"compression-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if not (folder / "ready").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # freed by its holder's death
            if not (folder / "ready").exists():
                _make(folder, shared)
    return folder / "bin" / "python"


def _make(folder: Path, shared: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(LOCK)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise AdaptfleetError(f"pip did not install {LOCK.name} in {_INSTALL_TIMEOUT_S} s. Run it again.") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise AdaptfleetError(
            f"pip could not install {LOCK.name}: {lines[-1] if lines else f'exit status {done.returncode}'}. "
            f"Point pip at an index that has its packages."
        )
    site = next((folder / "lib").glob("python3.*/site-packages"))
    # Read after the environment's own folder, so that its packages come first.
    (site / "platform.pth").write_text("".join(f"{entry}\n" for entry in shared), encoding="utf-8")
    (folder / "ready").touch()
