"""Loss, optimizer, schedule and LoRA against plain PyTorch."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F  # noqa: N812

from adaptfleet.contracts.errors import ContractError, TrainingError
from adaptfleet.contracts.methods import Lora
from adaptfleet.core.checkpoint import read_progress, read_tensors, write_checkpoint
from adaptfleet.core.export import export_adapter
from adaptfleet.core.losses import CHUNK_POSITIONS, summed_cross_entropy
from adaptfleet.core.methods.lora import LoraAdaptation
from adaptfleet.core.optimizer import MasterAdamW
from adaptfleet.core.schedule import warmup_cosine
from tests.training.conftest import VOCABULARY, make_model


@pytest.mark.parametrize("num_positions", [1, CHUNK_POSITIONS, CHUNK_POSITIONS + 1, 2 * CHUNK_POSITIONS + 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_chunked_cross_entropy_equals_pytorch(num_positions: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_positions, 16, requires_grad=True)
    weight_VD, bias_V = torch.randn(50, 16), torch.randn(50) if has_bias else None
    labels_N = torch.randint(0, 50, (num_positions,))
    ours = summed_cross_entropy(hidden_ND, weight_VD, bias_V, labels_N)
    (ours * 0.37).backward()
    our_grad, hidden_ND.grad = hidden_ND.grad, None
    reference = F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V), labels_N, reduction="sum")
    (reference * 0.37).backward()
    assert float(ours.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    torch.testing.assert_close(our_grad, hidden_ND.grad, rtol=1e-4, atol=1e-5)
    assert float(summed_cross_entropy(hidden_ND.detach(), weight_VD, bias_V, labels_N)) == pytest.approx(float(reference), rel=1e-5)


def test_warmup_and_cosine() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5) and factors[99] < 1e-3
    assert warmup_cosine(0, 1, 0.0) == 1.0


def test_lora_begins_as_the_base_exactly() -> None:
    tokens = torch.arange(3, 40)[None]
    base = make_model("llama")(input_ids=tokens).logits
    adapted = LoraAdaptation(Lora(rank=4)).attach(make_model("llama"), 0)(input_ids=tokens).logits
    assert torch.equal(base, adapted)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_lora_adds_its_scaled_product(use_rslora: bool, scale: float) -> None:
    model = LoraAdaptation(Lora(rank=4, alpha=8, targets=("q_proj",), use_rslora=use_rslora)).attach(make_model("llama"), 0)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 32)
    product = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * product)


@pytest.mark.parametrize(
    ("architecture", "method", "says"),
    [
        ("llama", Lora(targets=("q_porj", "v_proj")), "'q_porj' match no linear module. Did you mean 'q_proj'"),
        ("llama", Lora(rank=33), "method.rank is 33, more than the smaller side"),
        ("gpt2", Lora(targets=("q_proj",)), "The model has c_attn"),
    ],
)
def test_targets_and_ranks_that_cannot_be(architecture: str, method: Lora, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        LoraAdaptation(method).attach(make_model(architecture), 0)


def trained(seed: int, num_updates: int, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, MasterAdamW]:
    model = LoraAdaptation(Lora(rank=2)).attach(make_model("llama").to(dtype), 0)
    optimizer = MasterAdamW(model, weight_decay=0.1)
    advance(model, optimizer, range(num_updates))
    return model, optimizer


def advance(model: PeftModel, optimizer: MasterAdamW, updates: range) -> None:
    for update in updates:
        tokens = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(update))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step(1e-2, max_grad_norm=1.0)
        optimizer.zero_grad()


def test_float32_updates_are_those_of_adamw() -> None:
    """Of the same gradients: a model's own may differ in the last bit between two passes, and Adam's first update takes only their sign."""
    ours, reference = (LoraAdaptation(Lora(rank=2)).attach(make_model("llama"), 0) for _ in range(2))
    optimizer = MasterAdamW(ours, weight_decay=0.1)
    parameters = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3, 10.0, 1e-7):  # clipped and not
        for name, parameter in parameters.items():
            parameter.grad = size * torch.randn(parameter.shape, generator=draw)
            optimizer.parameters[name].grad = parameter.grad.clone()
        norm = optimizer.step(1e-2, max_grad_norm=1.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)), rel=1e-6)
        adam.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(optimizer.parameters[name], parameter, rtol=1e-6, atol=1e-7, msg=name)


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    _, optimizer = trained(0, 1, torch.bfloat16)
    name = next(iter(optimizer.masters))
    before = optimizer.masters[name].clone()
    for _ in range(8):
        optimizer.parameters[name].grad = torch.ones_like(optimizer.parameters[name])
        optimizer.step(1e-6, max_grad_norm=1.0)
    assert (optimizer.masters[name] != before).all()
    assert torch.equal(optimizer.parameters[name], optimizer.masters[name].to(torch.bfloat16))


def test_a_checkpoint_takes_the_run_up_exactly(tmp_path: Path) -> None:
    whole, _ = trained(0, 6)
    _, optimizer = trained(0, 3)
    write_checkpoint(tmp_path / "c", optimizer.state(), {"step": 3})
    resumed = LoraAdaptation(Lora(rank=2)).attach(make_model("llama"), 0)
    torch.manual_seed(99)
    optimizer = MasterAdamW(resumed, weight_decay=0.1)
    progress = read_progress(tmp_path / "c")
    optimizer.load_state(read_tensors(tmp_path / "c", optimizer.state()))
    advance(resumed, optimizer, range(progress["step"], 6))
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("damage", ["truncated", "changed", "no tensors", "no progress", "half a progress"])
def test_a_torn_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "c"
    write_checkpoint(folder, {"x": torch.arange(100.0)}, {"step": 1})
    tensors, progress = next(folder.glob("*.safetensors")), folder / "progress.json"
    content = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(content[:-9])
    elif damage == "changed":
        tensors.write_bytes(content[:-9] + b"x" + content[-8:])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no progress":
        progress.unlink()
    else:
        progress.write_text(progress.read_text()[:9])
    with pytest.raises(TrainingError, match="is torn"):
        read_progress(folder)


def test_the_exported_adapter_is_what_was_trained(tmp_path: Path) -> None:
    model, _ = trained(0, 3)
    export_adapter(model, tmp_path / "adapter", "tiny")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "adapter"))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_every_worker_draws_the_same_adapter() -> None:
    def drawn(seed: int, ambient: int) -> torch.Tensor:
        model = make_model("llama")
        torch.manual_seed(ambient)
        return torch.cat([p.detach().flatten() for p in LoraAdaptation(Lora(rank=4)).attach(model, seed).parameters() if p.requires_grad])

    assert torch.equal(drawn(3, ambient=1), drawn(3, ambient=2))
    assert not torch.equal(drawn(3, ambient=1), drawn(4, ambient=1))
