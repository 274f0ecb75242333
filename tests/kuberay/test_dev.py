"""`adaptfleet dev` as a user runs it."""

import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = "k8s/overlays/dev-cpu"
LIMIT_S = 400


def _adaptfleet(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from adaptfleet.cli import main; sys.exit(main())", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=LIMIT_S, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_is_wrong_is_said_before_anything_starts(fresh_home: Path, tmp_path: Path) -> None:
    pool = yaml.safe_load((REPOSITORY / "tests" / "kuberay" / "pool.yaml").read_text())
    pool["spec"]["autoscalerOptions"]["version"] = "v1"
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    for words, said in (
        (["up", str(tmp_path / "pool.yaml")], "v1"),
        (["up", str(tmp_path / "none.yaml")], "does not exist"),
        (["up", str(tmp_path / "pool.yaml"), "--fleet", "gpus"], "RESOURCE=AMOUNT"),
        (["apply", str(REPOSITORY / "tests" / "kuberay" / "service.yaml")], "dev up"),
        (["lose", "x"], "dev up"),
    ):
        refused = _adaptfleet("dev", *words, check=False)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert _adaptfleet("dev", "status", check=False).returncode == 1
    assert list(fresh_home.iterdir()) == []
