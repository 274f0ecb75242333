"""Training from mapped rows is training from lists, to the last bit, and a saved plan is the plan."""

from pathlib import Path

import numpy as np
import pytest

from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import Lora
from adaptfleet.core.data import tokens
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.tokens import Rows, TokenFile, record_batch, write_tokens
from adaptfleet.core.evaluation.held_out import held_out_loss
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.lora import LoraAdaptation
from adaptfleet.core.steps import StepPlan, load_plan, plan_steps
from tests.training.conftest import make_model
from tests.training.test_loop import rows


def test_losses_are_those_of_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_RELEASED_AFTER", 3)
    listed = rows()
    # In two files and in another order than the rows'.
    shuffled = np.random.default_rng(0).permutation(len(listed))
    stored = [listed[i] for i in shuffled]
    write_tokens(tmp_path / "a.arrow", [record_batch(stored[:9]), record_batch(stored[9:15])])
    write_tokens(tmp_path / "b.arrow", [record_batch(stored[15:])])
    mapped = Rows([TokenFile(tmp_path / name) for name in ("a.arrow", "b.arrow")], np.argsort(shuffled))
    train = TrainSpec(epochs=1, pack_tokens=64, packs_per_step=3, learning_rate=0.01)
    plan_steps(mapped, train).save(tmp_path)

    def losses(data: Rows | list[Encoded], plan: StepPlan) -> list[tuple[float, int]]:
        adaptation = LoraAdaptation(Lora(rank=4))
        trainer = Trainer(adaptation.attach(make_model("llama"), 0), adaptation, train, plan, data, pad_id=0)
        return [(r.loss, r.num_tokens) for r in trainer.run()]

    assert losses(mapped, load_plan(tmp_path)) == losses(listed, plan_steps(listed, train))
    model = LoraAdaptation(Lora(rank=4)).attach(make_model("llama"), 0)
    assert held_out_loss(model, mapped[:9], 64, 0) == held_out_loss(model, listed[:9], 64, 0)
