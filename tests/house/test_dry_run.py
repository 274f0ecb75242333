"""`--dry-run` of every shipped job checks and prints its contract before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "ray", "vllm", "pyarrow", "datasets")
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))

_RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code or 0
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else status)
"""


def _program(config: Path) -> Path:
    """`finetune_address.yaml` is a contract of `finetune.py`."""
    return ROOT / "jobs" / f"{config.stem.partition('_')[0]}.py"


def _dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _RUN, *arguments, "--dry-run"], capture_output=True, text=True, cwd=ROOT, check=False)


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_dry_run_prints_the_contract_and_imports_nothing_heavy(config: Path) -> None:
    done = _dry_run(str(_program(config)), "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"] == config.stem.partition("_")[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_misspelt_key_is_an_error_before_anything_heavy(config: Path) -> None:
    done = _dry_run(str(_program(config)), "--config", str(config), "--set", "naem=1")
    assert done.returncode == 2, done.stderr
    assert "naem" in done.stderr and "Traceback" not in done.stderr and "imported" not in done.stderr
