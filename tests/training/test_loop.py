"""The plan of steps and the loop, without Ray."""

import pytest
import torch

from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import Lora
from adaptfleet.core.compilation import compile_layers, should_compile
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.lora import LoraAdaptation
from adaptfleet.core.steps import plan_steps
from tests.training.conftest import VOCABULARY, make_model


def rows(num_rows: int = 40) -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 30, (num_rows,), generator=generator).tolist()
    return [Encoded(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), [False] * 3 + [True] * (n - 3)) for n in lengths]


def trainer(dropout: float = 0.0, seed: int = 0, **settings: object) -> Trainer:
    train = TrainSpec.model_validate({"epochs": 2, "pack_tokens": 64, "packs_per_step": 3, "learning_rate": 0.01, **settings})
    adaptation = LoraAdaptation(Lora(rank=4, dropout=dropout))
    data = rows()
    return Trainer(adaptation.attach(make_model("llama", seed), 0), adaptation, train, plan_steps(data, train), data, pad_id=0)


@pytest.mark.parametrize(("epochs", "times"), [(1.0, 1), (3.0, 3)])
def test_each_row_comes_once_an_epoch(epochs: float, times: int) -> None:
    data = rows()
    plan = plan_steps(data, TrainSpec(epochs=epochs, pack_tokens=64, packs_per_step=4))
    seen = [i for step in plan.steps for pack in step for i in pack.indices]
    assert sorted(seen) == sorted(list(range(len(data))) * times)
    assert plan.num_tokens == times * sum(len(row) for row in data)


def test_half_an_epoch_and_a_limit_of_steps() -> None:
    data = rows()
    half = plan_steps(data, TrainSpec(epochs=0.5, pack_tokens=64))
    assert sum(len(pack.indices) for step in half.steps for pack in step) == len(data) // 2
    assert len(plan_steps(data, TrainSpec(epochs=5, max_steps=3, pack_tokens=64)).steps) == 3


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_share_each_step(num_workers: int) -> None:
    plan = plan_steps(rows(), TrainSpec(epochs=1, pack_tokens=64, packs_per_step=6))
    for step, packs in enumerate(plan.steps):
        shares = [plan.share(step, rank, num_workers) for rank in range(num_workers)]
        assert sorted(p.indices for share in shares for p in share) == sorted(p.indices for p in packs)


def test_the_loss_falls() -> None:
    curve = [result.loss for result in trainer(epochs=6).run()]
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])


def test_small_passes_add_up_to_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    large = [r.loss for r in trainer().run()]
    monkeypatch.setattr("adaptfleet.core.loop.TOKENS_PER_PASS", 64)
    small = [r.loss for r in trainer().run()]
    assert small == pytest.approx(large, rel=1e-4)


def test_a_resumed_run_repeats_its_dropout() -> None:
    whole = [r.loss for r in trainer(dropout=0.3).run()]
    first = trainer(dropout=0.3)
    for result in first.run():
        if result.step == 4:
            break
    torch.manual_seed(1234)
    second = trainer(dropout=0.3)
    second.load_state(first.state(), first.step)
    assert [r.loss for r in second.run()] == whole[4:]


def test_a_loss_that_is_no_number_names_its_rows() -> None:
    diverged = trainer(learning_rate=1e30, warmup_fraction=0.0)
    with pytest.raises(TrainingError, match=r"the loss of step \d+ is nan.*first training rows are \["):
        list(diverged.run())


def test_compiled_layers_have_the_losses_of_eager_ones() -> None:
    eager = [r.loss for r in trainer(max_steps=4).run()]
    compiled = trainer(max_steps=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled.model)
    assert [r.loss for r in compiled.run()] == pytest.approx(eager, rel=1e-4)
    # one graph for the first layer, whose input needs no gradient, one for all others, and nothing that falls back
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_when_compiling_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert should_compile("on", 1)[0] and not should_compile("off", 10**9)[0]
    assert not should_compile("auto", 1000)[0]
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert should_compile("auto", 10**9) == (False, "no C++ compiler (g++) is installed; with one, training can be up to 1.3 times as fast")
