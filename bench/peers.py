"""Environments of peers, under build/."""

import subprocess
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def overlay(folder: Path, *pins: str) -> Path:
    """Python of an environment that holds these and sees the packages of .venv; made once."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python3.*/site-packages"))
        shared = next((REPOSITORY / ".venv" / "lib").glob("python3.*/site-packages"))
        (site / "shared.pth").write_text(f"{shared}\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *pins], check=True)
        (folder / "ready").touch()
    return python
