"""One endpoint of two bases: a plain one, and a published one in 8 bits; an adapter of each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import BaseSpec
from tests.serve.endpoint.conftest import Endpoint, running_endpoint
from tests.serve.engines import engine, greedy_answers
from tests.serve.tiny_llama import make_adapter, make_base

PROMPT = "Where is it? "
NUM_TOKENS = 12


@dataclass(frozen=True)
class Several:
    endpoint: Endpoint
    small: Path
    """The rounded base's folder."""
    answers: dict[str, list[int]]
    """What a plain engine of `small` alone answers, by model."""


def rounded(base: Path, out: Path) -> Path:
    """A compressed-tensors checkpoint, its head too: int8 weights with a scale for each output channel, int8 inputs with one for each
    token."""
    out.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    for name in [name for name in tensors if "_proj." in name or "lm_head" in name]:
        scale_O1 = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale_O1).round().to(torch.int8)
        tensors[name.replace("weight", "weight_scale")] = scale_O1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear", "re:.*lm_head"],
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {"group_0": group},
    }
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "quantization_config": quantization}))
    return out


@pytest.fixture(scope="package")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    from adaptfleet.core.models.loading import base_revision
    from adaptfleet.store.registry import Registry

    root = tmp_path_factory.mktemp("several")
    plain = make_base(root / "plain", seed=7)
    small = rounded(plain, root / "small")
    numbers = make_adapter(plain, root / "numbers", 8, seed=3)
    prompt = list(_ids(plain))
    with engine(small, dtype="bfloat16", max_model_len=256, max_lora_rank=16) as llm:
        alone = greedy_answers(llm, [("small", prompt)], {}, NUM_TOKENS) + greedy_answers(
            llm, [("numbers", prompt)], {"numbers": numbers}, NUM_TOKENS
        )
    further = BaseSpec(
        model=ModelSpec(source="small", dtype="bfloat16"),
        max_loras=2,
        max_lora_rank=16,
        max_model_len=256,
        max_num_seqs=4,
        cpus_per_replica=1,
    )

    def publish() -> None:
        registry = Registry.open()
        registry.publish(Draft(kind="model", name="small"), small, "prod")
        draft = Draft(kind="adapter", name="numbers", base="small", base_revision=base_revision(small), method={"kind": "lora", "rank": 8})
        registry.publish(draft, numbers, "prod")

    with running_endpoint(root, 4, publish, more_bases=(further,)) as made:
        made.publish("streets", made.adapter("streets", 8, 1))
        made.wait_for("streets")
        yield Several(made, small, dict(zip(("small", "numbers"), alone, strict=True)))


def _ids(base: Path) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(base)(PROMPT).input_ids)
