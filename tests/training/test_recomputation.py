"""Gradient checkpointing: the same losses, from layers that are computed twice; and when it is chosen."""

import pytest
import torch
from pydantic import ValidationError

from adaptfleet.contracts.jobs import FinetuneJob, TrainSpec
from adaptfleet.contracts.methods import Lora, Method, PrefixTuning
from adaptfleet.core.compilation import compile_layers, decoder_layers
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.recomputation import activation_bytes, recompute_layers, should_recompute
from adaptfleet.core.steps import plan_steps
from tests.training.conftest import CONFIGS, make_model
from tests.training.test_methods import METHODS, rows

GIB = 2**30


def trainer(architecture: str = "llama", method: Method = Lora(rank=4, dropout=0.2)) -> Trainer:
    train = TrainSpec(epochs=3, max_steps=4, pack_tokens=64, packs_per_step=3, learning_rate=0.01)
    adapted, data = adaptation(method), rows()
    return Trainer(adapted.attach(make_model(architecture), 0), adapted, train, plan_steps(data, train), data, pad_id=0)


def calls_of_a_layer(run: Trainer) -> list[int]:
    """Rows of each forward call of the second layer's attention or feed-forward, to come."""
    calls: list[int] = []
    inner = next(module for module in decoder_layers(run.model)[1].modules() if isinstance(module, torch.nn.Linear))
    inner.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize("architecture", CONFIGS)
def test_recomputed_layers_have_the_losses_of_kept_ones(architecture: str) -> None:
    kept, recomputed = trainer(architecture), trainer(architecture)
    recompute_layers(recomputed.model)
    once, twice = calls_of_a_layer(kept), calls_of_a_layer(recomputed)
    # dropout draws the same numbers the second time
    assert [r.loss for r in recomputed.run()] == pytest.approx([r.loss for r in kept.run()], rel=1e-6)
    assert once and len(twice) == 2 * len(once)


def test_compiled_layers_can_be_recomputed() -> None:
    kept, recomputed = trainer(method=Lora(rank=4)), trainer(method=Lora(rank=4))
    torch._dynamo.reset()
    compile_layers(recomputed.model)
    recompute_layers(recomputed.model)
    assert [r.loss for r in recomputed.run()] == pytest.approx([r.loss for r in kept.run()], rel=1e-4)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.kind != "prefix"])
def test_every_method_but_prefix_goes_with_it(name: str) -> None:
    kept, recomputed = trainer(method=METHODS[name]), trainer(method=METHODS[name])
    recompute_layers(recomputed.model)
    assert [r.loss for r in recomputed.run()] == pytest.approx([r.loss for r in kept.run()], rel=1e-6)


def test_auto_is_on_where_the_activations_do_not_fit() -> None:
    model = trainer().model
    # 3 layers of q 64, k and v 48, o 64, gate, up and down 96 numbers in float32, and as many beside them
    needed = 2 * 1024 * 3 * (64 + 48 + 48 + 64 + 3 * 96) * 4
    assert activation_bytes(model, 1024) == needed
    assert should_recompute("auto", model, 1024, GIB, 2 * GIB)[0] is False
    on, reason = should_recompute("auto", model, 1_000_000, GIB, 2 * GIB)
    assert on and "of 1,000,000 tokens need about 11.44 GiB beside 1.00 GiB" in reason and "a worker has 1.80 GiB" in reason
    assert should_recompute("off", model, 10**9, GIB, GIB)[0] is False and should_recompute("on", model, 1, 0, GIB)[0] is True


def test_a_prefix_does_not_go_with_it() -> None:
    model = trainer(method=PrefixTuning(num_virtual_tokens=3)).model
    on, reason = should_recompute("auto", model, 10**9, GIB, GIB)
    assert not on and "reaches the layers as a cache" in reason
    with pytest.raises(ValidationError, match="would take twice; use auto or off"):
        FinetuneJob.model_validate({"method": {"kind": "prefix"}, "train": {"gradient_checkpointing": "on"}, "publish": None})
