"""What a fine-tune of any method leaves in its folder is evaluated as it was trained."""

from pathlib import Path

import pytest
import torch

from adaptfleet.core.data.encoding import encode_all
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.evaluation.held_out import greedy_answers
from adaptfleet.core.evaluation.row_losses import row_losses
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.on_ray.evaluate.local_models import load_adapter
from tests.training.conftest import make_model, make_tokenizer
from tests.training.test_methods import METHODS

EXAMPLES = [Example((Message("user", "x" * n), Message("assistant", f"What is {n}?"))) for n in (3, 21, 11)]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_the_loaded_adapter_is_the_trained_one(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = encode_all(EXAMPLES, tokenizer, 200)
    base_losses = [r.nats for r in row_losses(make_model("llama"), rows, 0)]
    method = adaptation(METHODS[name], tokenizer)
    trained = method.attach(make_model("llama"), 0)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wanted = [r.nats for r in row_losses(trained, rows, 0)]
    answers = greedy_answers(trained, tokenizer, EXAMPLES, 6)
    method.export(trained, tmp_path / "adapter", "base")
    loaded = load_adapter(make_model("llama"), tmp_path / "adapter")
    # PiSSA's is exported as a difference, AdaLoRA's as plain LoRA: the same products in another order
    assert [r.nats for r in row_losses(loaded, rows, 0)] == pytest.approx(wanted, rel=1e-4)
    assert greedy_answers(loaded, tokenizer, EXAMPLES, 6) == answers
    assert wanted != pytest.approx(base_losses, rel=1e-4)
