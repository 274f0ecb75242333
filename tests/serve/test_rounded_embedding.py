"""The plug-in's look-up of rounded embeddings on a CPU: the values that the checkpoint means, and in the real engine."""

import importlib.util

import pytest
import torch
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding as upstream

from adaptfleet.core.quantization.dequantization import dequantized
from adaptfleet.on_ray.serve.rounded_embedding import looked_up, register

IDS = torch.tensor([3, 0, 9, 3])


def stored(bits: int, groups: int) -> dict[str, torch.Tensor]:
    """A module's tensors of 10 rows of 64 values, as compressed-tensors stores them."""
    words = torch.randint(-(2**31), 2**31, (10, 64 * bits // 32)).to(torch.int32)
    scale = (torch.rand(10, groups) + 0.5).bfloat16()
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([10, 64])}


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 2), (4, 1)])
def test_rows_are_what_the_checkpoint_means(bits: int, groups: int) -> None:
    parts = stored(bits, groups)
    rows = looked_up(IDS, parts["weight_packed"], parts["weight_scale"], 64, bits)
    assert torch.equal(rows, dequantized(parts, bits)[IDS].bfloat16())
    assert looked_up(IDS[:0], parts["weight_packed"], parts["weight_scale"], 64, bits).shape == (0, 64)


def test_it_stands_in_for_vllms() -> None:
    parts = stored(8, 1)
    register()
    register()
    layer = torch.nn.Module()
    layer.hidden_size = 64
    for name in ("weight_packed", "weight_scale"):
        layer.register_parameter(name, torch.nn.Parameter(parts[name], requires_grad=False))
    method = upstream.CompressedTensorsEmbeddingWNA16Int.__new__(upstream.CompressedTensorsEmbeddingWNA16Int)
    method.num_bits = 8
    method.process_weights_after_loading(layer)
    assert torch.equal(method.embedding(layer, IDS[None]), dequantized(parts, 8)[IDS].bfloat16()[None])
    assert layer.weight.device.type == "cpu"


def test_vllm_still_needs_it() -> None:
    """Fails when vLLM looks a rounded embedding up on a CPU by itself: then `rounded_embedding` can go."""
    spec = importlib.util.spec_from_file_location("untouched", str(upstream.__file__))
    assert spec and spec.loader
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    parts = stored(8, 1)
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        untouched._dequant_gather_triton(IDS, parts["weight_packed"], parts["weight_scale"], 64, 8)
