"""A rotated model computes what the model computed, and has no outliers to round."""

import pytest
import torch

from adaptfleet.contracts.errors import ModelError
from adaptfleet.core.quantization.dequantization import rounded_input
from adaptfleet.core.quantization.rotation import orthogonal, rotate
from tests.compression.conftest import make_model

IDS = torch.tensor([[5, 17, 200, 3, 99, 250, 7, 42, 42, 11]])


@pytest.mark.parametrize("name", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_nothing_changes(name: str) -> None:
    model = make_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        whole = model(IDS).logits
        rotate(model)
        torch.testing.assert_close(model(IDS).logits, whole, atol=2e-4, rtol=2e-4)
    unchanged = [key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])]
    assert not [key for key in unchanged if "proj.weight" in key or "embed" in key or "lm_head" in key], unchanged
    assert not model.config.tie_word_embeddings


def test_an_outlier_is_spread() -> None:
    model = make_model("llama")
    model.model.embed_tokens.weight.data[:, 7] *= 60
    found = []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    with torch.no_grad():
        model(IDS)
        rotate(model)
        model(IDS)
    errors = [float((rounded_input(x, False, None) - x).norm() / x.norm()) for x in found]
    # 64 channels: the largest was eight times the root mean square, and is two to three times of it
    assert errors[1] < 0.6 * errors[0], errors


def test_rotations_are_orthogonal_and_repeat() -> None:
    turn = orthogonal(24, 3)
    torch.testing.assert_close(turn @ turn.T, torch.eye(24, dtype=torch.float64))
    assert torch.equal(turn, orthogonal(24, 3)) and not torch.equal(turn, orthogonal(24, 4))


def test_other_norms_are_refused() -> None:
    with pytest.raises(ModelError, match=r"rotate works for llama, mistral, qwen2, qwen3, not for opt"):
        rotate(make_model("opt"))
