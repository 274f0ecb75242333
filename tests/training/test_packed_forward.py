"""Packed rows give what separate rows give, in the call that training makes, for each architecture."""

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GraniteConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.methods import Lora
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.methods.lora import LoraAdaptation
from adaptfleet.core.packed_forward import PackedBatch, check_packable, hidden_states, summed_loss
from tests.training.conftest import CONFIGS, VOCABULARY, make_model

# float32 sums in another order over three layers; leakage measures 0.1 and more
TOLERANCE = 2e-5


def rows(seed: int) -> list[Encoded]:
    generator = np.random.default_rng(seed)
    return [Encoded(generator.integers(3, VOCABULARY, n).tolist(), [False] * (n // 2) + [True] * (n - n // 2)) for n in (11, 5, 17, 8)]


def packed(examples: list[Encoded], pack_tokens: int) -> PackedBatch:
    return PackedBatch.stack([pack_arrays(Pack(tuple(range(len(examples)))), examples, pack_tokens, 0)], torch.device("cpu"))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_gradients_equal_those_of_separate_rows(architecture: str) -> None:
    model = LoraAdaptation(Lora(rank=4)).attach(make_model(architecture), 0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    examples = rows(2)

    def loss_and_gradients(batches: list[PackedBatch]) -> tuple[float, torch.Tensor]:
        total = 0.0
        for batch in batches:
            loss = summed_loss(model, batch)
            loss.backward()
            total += float(loss)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.flatten() for p in trained])
        for p in trained:
            p.grad = None
        return total, gradient

    one, one_gradient = loss_and_gradients([packed(examples, 64)])
    many, many_gradient = loss_and_gradients([packed([example], len(example)) for example in examples])
    assert one == pytest.approx(many, rel=TOLERANCE)
    assert (one_gradient - many_gradient).norm() <= 1e-4 * many_gradient.norm()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_another_neighbour_changes_nothing(architecture: str) -> None:
    model = make_model(architecture)
    first, second = rows(3), rows(4)
    with torch.no_grad():
        a = hidden_states(model, packed([first[0], first[1]], 16))[0, 11:]
        b = hidden_states(model, packed([second[0], first[1]], 16))[0, 11:]
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_loss_is_what_transformers_computes(architecture: str) -> None:
    model = make_model(architecture)
    example = rows(5)[2]
    labels = [t if labelled else -100 for t, labelled in zip(example.input_ids, example.label_mask, strict=True)]
    with torch.no_grad():
        reference = model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([labels])).loss
        ours = summed_loss(model, packed([example], len(example))) / sum(example.label_mask[1:])
    assert float(ours) == pytest.approx(float(reference), rel=TOLERANCE)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_passes_its_own_check(architecture: str) -> None:
    check_packable(make_model(architecture), VOCABULARY, 64, 30)


def test_a_soft_capped_head_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, final_logit_softcapping=0.5, sliding_window=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="more to its logits"):
        check_packable(model, VOCABULARY, 64, 30)


def test_a_scaled_head_is_refused() -> None:
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        logits_scaling=4.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="more to its logits"):
        check_packable(model, VOCABULARY, 64, 30)


def test_a_model_that_leaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    forward = model.base_model.forward
    # What transformers does by itself once a cache is on: the mask of packed rows is lost.
    monkeypatch.setattr(model.base_model, "forward", lambda **kwargs: forward(**{**kwargs, "attention_mask": None, "use_cache": True}))
    with pytest.raises(ModelError, match="see each other"):
        check_packable(model, VOCABULARY, 64, 30)


def test_examples_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ModelError, match="300 tokens, but the model has 256 positions"):
        check_packable(make_model("gpt2"), VOCABULARY, 512, 300)
