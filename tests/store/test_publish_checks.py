"""What must not be published is refused before anything is written, with every reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.errors import PublishError
from adaptfleet.store.registry import Registry
from adaptfleet.store.safetensors_header import read_header
from tests.store.drafts import RANK, adapter, dataset, lora_tensors

Make = Callable[..., Path]


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry.open((tmp_path / "store").as_uri())


def refusal(registry: Registry, draft: Draft, folder: Path) -> str:
    with pytest.raises(PublishError) as caught:
        registry.publish(draft, folder)
    assert registry._objects.list("") == []
    return str(caught.value)


def test_a_plain_adapter_is_published(local: Registry, make_adapter: Make) -> None:
    assert local.publish(adapter(), make_adapter({"init_lora_weights": "gaussian", "use_rslora": True})).version == 1


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_adapter(local: Registry, make_adapter: Make, kept: int) -> None:
    folder = make_adapter()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "adapter_model.safetensors: it " in refusal(local, adapter(), folder)


def test_a_file_longer_than_its_header_says(local: Registry, make_adapter: Make) -> None:
    folder = make_adapter()
    with (folder / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert "longer than its tensors" in refusal(local, adapter(), folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b"[" * 100_000,
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="no safetensors header"):
        read_header(file)


def test_a_header_longer_than_any_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="no safetensors file"):
        read_header(file)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "DoRA is not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": []}, "target_modules is []"),
        ({"r": 8}, "the shapes are not of the rank"),
        ({"rank_pattern": {"v_proj": 8}}, "not rank 8"),
    ],
)
def test_configs_that_would_be_served_wrongly(local: Registry, make_adapter: Make, config: dict[str, object], reason: str) -> None:
    assert reason in refusal(local, adapter(method=None), make_adapter(config))


def test_ranks_by_pattern(local: Registry, make_adapter: Make) -> None:
    tensors = lora_tensors(RANK, ("q_proj",)) | lora_tensors(8, ("v_proj",))
    local.publish(adapter(), make_adapter({"rank_pattern": {"v_proj": 8}}, tensors))


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("base_model.model.lm_head.weight", np.ones((2, 2), np.float32), "lm_head.weight (F32[2, 2])"),
        ("base_model.model.q.lora_A.weight", np.ones((RANK, 2), np.int8), "I8"),
        ("base_model.model.q.lora_A.weight", np.ones((RANK, 2), np.float32), "only one of lora_A and lora_B"),
        ("base_model.model.e.lora_embedding_A", np.ones((RANK, 2), np.float32), "lora_embedding_A"),
    ],
)
def test_tensors_that_are_not_served(local: Registry, make_adapter: Make, tensor: str, value: np.ndarray, reason: str) -> None:
    assert reason in refusal(local, adapter(), make_adapter(tensors=lora_tensors() | {tensor: value}))


def test_all_offenders_at_once(local: Registry, make_adapter: Make) -> None:
    folder = make_adapter({"use_dora": True, "bias": "all", "r": 8})
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "link").symlink_to("/etc/passwd")
    text = refusal(local, adapter(base=None, base_revision=None), folder)
    for reason in (
        "training_args.bin",
        "'link': is a link",
        "base is missing",
        "base_revision is missing",
        "use_dora",
        "bias",
        "not of the rank",
    ):
        assert reason in text
    assert "says rank 4" in text and "r=8" in text


def test_an_adapter_is_not_named_like_its_base(local: Registry, make_adapter: Make) -> None:
    assert "base's own id" in refusal(local, adapter("smollm2-135m"), make_adapter())


def test_pickled_weights(local: Registry, make_adapter: Make) -> None:
    folder = make_adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    text = refusal(local, adapter(), folder)
    assert "adapter_model.bin: may hold pickled Python" in text and "adapter_model.safetensors is missing" in text


def test_configs_that_are_no_json(local: Registry, make_adapter: Make) -> None:
    folder = make_adapter()
    for text in ("{", "[]", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        assert "adapter_config.json" in refusal(local, adapter(), folder)


def test_folders_with_links_pipes_and_odd_names(local: Registry, rows: Path) -> None:
    (rows / "up").symlink_to("..")
    (rows / "file.txt").symlink_to(rows / "train.jsonl")
    (rows / "what?.txt").write_text("")
    (rows / "a#1").write_text("")
    (rows / "back\\slash").write_text("")
    os.mkfifo(rows / "pipe")
    text = refusal(local, dataset(), rows)
    for reason in ("'up': is a link", "'file.txt': is a link", "what?.txt", "a#1", "back\\\\slash", "'pipe': is neither"):
        assert reason in text


def test_folders_that_hold_no_artifact(local: Registry, tmp_path: Path) -> None:
    assert "it is no folder" in refusal(local, dataset(), tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in refusal(local, dataset(), tmp_path / "empty")
    text = refusal(local, Draft(kind="model", name="m"), tmp_path / "empty")
    assert "config.json is missing" in text and "no .safetensors file" in text


def test_a_model_with_a_missing_and_a_truncated_shard(local: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": np.ones((4, 4), np.float32)}, folder / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors is missing" in refusal(local, Draft(kind="model", name="m"), folder)
    save_file({"v": np.ones((4, 4), np.float32)}, folder / "model-2.safetensors")
    assert local.publish(Draft(kind="model", name="m"), folder).version == 1
    os.truncate(folder / "model-2.safetensors", 100)
    with pytest.raises(PublishError, match=r"model-2\.safetensors: it is truncated"):
        local.publish(Draft(kind="model", name="m"), folder)
