"""QLoRA over a base that bitsandbytes really quantizes: trains, resumes, and is served as it was trained."""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import QLora
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.export import export_model
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.qlora import QLoraAdaptation, dequantized, keep_as_quantized, quantization_config
from adaptfleet.core.models.loading import load_base
from adaptfleet.core.packed_forward import check_packable
from adaptfleet.core.steps import plan_steps
from tests.training.conftest import make_tokenizer
from tests.training.test_methods import logits, rows

METHOD = QLora(rank=4, alpha=8)


def trainer(tiny_base: Path) -> Trainer:
    spec = ModelSpec(source=str(tiny_base), dtype="float32")
    base, _, _ = load_base(spec, quantization=quantization_config(METHOD, torch.float32))
    adapted = QLoraAdaptation(METHOD)
    train = TrainSpec(epochs=3, pack_tokens=64, packs_per_step=2, learning_rate=0.02)
    data = rows()
    return Trainer(adapted.attach(base, 0), adapted, train, plan_steps(data, train), data, pad_id=0)


def test_it_trains_on_four_bits_and_resumes(tiny_base: Path) -> None:
    whole = trainer(tiny_base)
    layer = whole.model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()
    assert type(layer).__name__ == "Linear4bit" and layer.weight.numel() * layer.weight.element_size() <= 32 * 32 / 2
    curve = [r.loss for r in whole.run()]
    assert sum(curve[-3:]) < sum(curve[:3])
    first, second = trainer(tiny_base), trainer(tiny_base)
    for result in first.run():
        if result.step == 5:
            break
    second.load_state(first.state(), first.step)
    assert [r.loss for r in second.run()] == pytest.approx(curve[5:], rel=1e-6)


def test_checking_the_base_leaves_its_weights_as_they_are(tiny_base: Path) -> None:
    """Where the processor computes bfloat16 fast, bitsandbytes repacks a layer's weights when it is first evaluated, unless told not to."""
    base, tokenizer, _ = load_base(
        ModelSpec(source=str(tiny_base), dtype="float32"), quantization=quantization_config(METHOD, torch.float32)
    )
    keep_as_quantized(base)
    layer = base.model.layers[0].self_attn.q_proj
    before = layer.weight.data.clone()
    check_packable(base, len(tokenizer), 64, 30)
    assert torch.equal(layer.weight.data, before)


def test_the_served_model_is_what_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    run = trainer(tiny_base)
    rounded = dequantized(run.model.get_base_model().model.layers[1].mlp.up_proj.get_base_layer())
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert 0.01 < (rounded - plain.model.layers[1].mlp.up_proj.weight).norm() / rounded.norm() < 0.2
    list(run.run())
    expected = logits(run.model)
    export_model(run.adaptation.merged(run.model), make_tokenizer(), tmp_path / "model")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert not hasattr(served.config, "quantization_config")
    change = (expected - logits(plain)).norm()
    assert (logits(served) - expected).norm() < 1e-3 * change
