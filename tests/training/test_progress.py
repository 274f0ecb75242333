"""What the job says of a run."""

from pathlib import Path

import pytest

from adaptfleet.on_ray.train.progress import ProgressTeller
from adaptfleet.on_ray.train.run_folder import RunFolder

PLACE = {"step": 3, "num_steps": 4, "settings": "layers not compiled: too few"}


def test_settings_are_told_however_late_one_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A quick run may be over before the first look."""
    folder = RunFolder(tmp_path)
    with ProgressTeller(folder):
        folder.write_json("progress.json", {**PLACE, "settings": "", "phase": "starting"})
        folder.write_json("progress.json", {**PLACE, "phase": "evaluating"})
    assert capsys.readouterr().out.splitlines() == ["layers not compiled: too few", "evaluating step 3/4 [##################------]"]
