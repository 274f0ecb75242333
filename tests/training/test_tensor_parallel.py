"""Layers cut between real processes over gloo: the losses, gradients and checkpoints of one process."""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from adaptfleet.contracts.errors import ContractError
from adaptfleet.core.tensor_parallel import check_splittable, layer_plan
from tests.training.conftest import CONFIGS
from tests.training.test_sharding import Run, assert_same, joined, result_of


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("qwen2", "lora"),  # biases cut by columns
        ("gpt_neox", "lora"),  # queries, keys and values in one module, biases added after the sum over rows
        ("llama", "prompt"),  # learnt embeddings outside of the layers
        ("qwen3", "full"),  # a norm of each head, whose gradient is summed over the group
    ],
)
def test_workers_with_parts_of_layers_have_the_losses_of_one(architecture: str, method: str, tmp_path: Path) -> None:
    alone = result_of(Run(method, architecture=architecture), tmp_path / "alone")
    assert_same(alone, result_of(Run(method, "fsdp2", 2, 2, architecture), tmp_path / "parts"))


def test_parts_of_layers_can_be_compiled_and_computed_again(tmp_path: Path) -> None:
    alone = result_of(Run("lora"), tmp_path / "alone")
    assert_same(alone, result_of(Run("lora", "fsdp2", 2, 2, compiled=True, recomputed=True), tmp_path / "parts"))


def test_a_run_goes_on_with_layers_cut_otherwise(tmp_path: Path) -> None:
    """Of a Llama with grouped heads and a tied embedding: two groups of two, then whole layers, then one group."""
    alone = result_of(Run("lora"), tmp_path / "alone")
    parts = [Run("lora", "fsdp2", 4, 2, stop=2), Run("lora", "fsdp2", 2, 1, stop=4), Run("lora", "fsdp2", 2, 2, stop=6)]
    assert_same(alone, joined(parts, tmp_path / "run"))


def meta_model(architecture: str) -> AutoModelForCausalLM:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[architecture])


def test_the_plan_names_every_linear_module_of_the_layers() -> None:
    plan = layer_plan(meta_model("llama"))
    assert len(plan) == 3 * 7
    assert plan["model.layers.2.self_attn.o_proj"] == "rowwise" and plan["model.layers.0.mlp.up_proj"] == "colwise"
    assert layer_plan(meta_model("qwen3"))["model.layers.1.self_attn.q_norm"] == "replicated_with_grad_allreduce"


@pytest.mark.parametrize(
    ("architecture", "size", "says"),
    [
        ("gpt2", 2, "no tensor-parallel plan for GPT2LMHeadModel. Use cluster.tensor_parallel=1"),
        ("llama", 4, "does not divide num_key_value_heads 2 of"),
        ("llama", 3, "does not divide num_attention_heads 4, num_key_value_heads 2, q_proj 32, k_proj 16"),
    ],
)
def test_what_cannot_be_cut_is_refused(architecture: str, size: int, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        check_splittable(meta_model(architecture), size)
