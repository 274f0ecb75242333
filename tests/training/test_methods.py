"""Every method: begins where it says, trains packed without leaks, resumes exactly, and is served as it was trained."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import (
    IA3,
    AdaLora,
    Bottleneck,
    Full,
    LlamaAdapter,
    Lora,
    Method,
    PrefixTuning,
    PromptTuning,
)
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.evaluation.held_out import held_out_loss
from adaptfleet.core.export import export_model
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.bottleneck import load_bottleneck
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.packed_forward import PackedBatch, hidden_states, summed_loss
from adaptfleet.core.steps import plan_steps
from tests.training.conftest import CONFIGS, VOCABULARY, make_model, make_tokenizer

METHODS: dict[str, Method] = {
    "lora": Lora(rank=4, alpha=8),
    "rslora": Lora(rank=4, alpha=8, use_rslora=True),
    "dora": Lora(rank=4, alpha=8, use_dora=True),
    "pissa": Lora(rank=4, alpha=8, init="pissa"),
    "pissa-rslora": Lora(rank=4, alpha=8, init="pissa", use_rslora=True),
    "adalora": AdaLora(rank=2, initial_rank=4, alpha=8, every_steps=2),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "prefix-projected": PrefixTuning(num_virtual_tokens=3, projection_size=16),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "ia3": IA3(),
    "houlsby": Bottleneck(placement="houlsby", reduction=4),
    "pfeiffer": Bottleneck(placement="pfeiffer", reduction=4, activation="gelu"),
    "llama-adapter": LlamaAdapter(num_virtual_tokens=4),
    "full": Full(),
}
PAIRS = [
    (name, architecture)
    for name in METHODS
    for architecture in CONFIGS
    if not (name == "llama-adapter" and architecture not in ("llama", "gpt2"))
    and not (name == "ia3" and architecture in ("qwen3",))
    and not ("pissa" in name and architecture == "gpt2")
]
IDENTITIES = ("lora", "rslora", "dora", "adalora", "ia3", "houlsby", "pfeiffer", "llama-adapter", "full")


def rows(num_rows: int = 24) -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, 30, (num_rows,), generator=generator).tolist()
    return [Encoded(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), [False] * 3 + [True] * (n - 3)) for n in lengths]


def trainer(method: Method, architecture: str = "llama", **settings: object) -> Trainer:
    train = TrainSpec.model_validate({"epochs": 2, "pack_tokens": 64, "packs_per_step": 2, "learning_rate": 0.02, **settings})
    adapted = adaptation(method)
    data = rows()
    return Trainer(adapted.attach(make_model(architecture), 0), adapted, train, plan_steps(data, train), data, pad_id=0)


def trained(method: Method, architecture: str = "llama") -> Trainer:
    run = trainer(method, architecture)
    list(run.run())
    run.model.eval()
    return run


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


def assert_is_the_trained_one(served: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """float32 rounding of merged or refactored weights, measured against what training changed."""
    change = (expected - base).norm()
    assert change > 0.01 * base.norm()
    assert (served - expected).norm() < 1e-3 * change


@pytest.mark.parametrize(("name", "architecture"), [(n, a) for n, a in PAIRS if n in IDENTITIES])
def test_it_begins_as_the_base(name: str, architecture: str) -> None:
    base = logits(make_model(architecture))
    torch.testing.assert_close(logits(adaptation(METHODS[name]).attach(make_model(architecture), 0)), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_packed_rows_give_the_loss_and_gradients_of_separate_ones(name: str, architecture: str) -> None:
    model = adaptation(METHODS[name]).attach(make_model(architecture), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    examples = rows(4)

    def loss_and_gradients(packs: list[tuple[int, ...]], pack_tokens: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for pack in packs:
            batch = PackedBatch.stack([pack_arrays(Pack(pack), examples, pack_tokens, 0)], torch.device("cpu"))
            loss = summed_loss(model, batch)
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    packed, packed_gradient = loss_and_gradients([(0, 1, 2, 3)], 128)
    apart, apart_gradient = loss_and_gradients([(0,), (1,), (2,), (3,)], 32)
    assert packed == pytest.approx(apart, rel=1e-4)
    assert (packed_gradient - apart_gradient).norm() < 1e-3 * apart_gradient.norm()


@pytest.mark.parametrize("name", METHODS)
def test_its_packed_loss_is_what_peft_computes(name: str) -> None:
    """The model's own forward, through peft, is what evaluation and users call."""
    model = trained(METHODS[name]).model
    example = rows()[2]
    batch = PackedBatch.stack([pack_arrays(Pack((0,)), [example], 32, 0)], torch.device("cpu"))
    labels = [t if m else -100 for t, m in zip(example.input_ids, example.label_mask, strict=True)]
    with torch.no_grad():
        ours = float(summed_loss(model, batch)) / sum(example.label_mask[1:])
        # AdaLoRA's own forward adds its penalty to the loss
        forward = model.get_base_model() if name == "adalora" else model
        theirs = forward(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([labels])).loss
        assert hidden_states(model, batch).shape[1] == 32
    assert ours == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_and_a_resumed_run_repeats_it(name: str) -> None:
    whole = trainer(METHODS[name], epochs=4)
    curve = [r.loss for r in whole.run()]
    assert sum(curve[-3:]) < sum(curve[:3])
    first = trainer(METHODS[name], epochs=4)
    for result in first.run():
        if result.step == len(curve) // 2:
            break
    second = trainer(METHODS[name], epochs=4)
    torch.manual_seed(99)
    second.load_state(copy.deepcopy(first.state()), first.step)
    assert [r.loss for r in second.run()] == curve[first.step :]


@pytest.mark.parametrize(("name", "architecture"), [(n, a) for n, a in PAIRS if METHODS[n].served_as() == "adapter" and a != "gpt2"])
def test_the_served_adapter_is_what_was_trained(name: str, architecture: str, tmp_path: Path) -> None:
    run = trained(METHODS[name], architecture)
    run.adaptation.export(run.model, tmp_path / "adapter", "tiny")
    served = PeftModel.from_pretrained(make_model(architecture), str(tmp_path / "adapter"))
    base, expected = logits(make_model(architecture)), logits(run.model)
    assert_is_the_trained_one(logits(served), expected, base)


@pytest.mark.parametrize(("name", "architecture"), [(n, a) for n, a in PAIRS if METHODS[n].served_as() == "model"])
def test_the_served_model_is_what_was_trained(name: str, architecture: str, tmp_path: Path) -> None:
    run = trained(METHODS[name], architecture)
    expected = logits(run.model)
    export_model(run.adaptation.merged(run.model), make_tokenizer(), tmp_path / "model")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert_is_the_trained_one(logits(served), expected, logits(make_model(architecture)))


@pytest.mark.parametrize("name", ["prefix", "prefix-projected", "prompt", "llama-adapter"])
def test_an_unserved_adapter_is_saved_by_peft(name: str, tmp_path: Path) -> None:
    run = trained(METHODS[name])
    run.adaptation.export(run.model, tmp_path / "adapter", "tiny")
    loaded = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
def test_bottlenecks_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    run = trained(METHODS[name])
    run.adaptation.export(run.model, tmp_path / "adapter", "tiny")
    torch.testing.assert_close(logits(load_bottleneck(make_model("llama"), tmp_path / "adapter")), logits(run.model), rtol=0, atol=0)
    networks = [m for n, m in run.model.named_modules() if n.endswith(".bottleneck")]
    assert len(networks) == (6 if name == "houlsby" else 3)


def test_houlsby_is_its_formula() -> None:
    model = adaptation(METHODS["houlsby"]).attach(make_model("llama"), 0)
    place = model.model.layers[0].self_attn.o_proj
    torch.nn.init.normal_(place.bottleneck.up.weight)
    x = torch.randn(5, 32)
    h = place.module(x)
    down, up = place.bottleneck.down, place.bottleneck.up
    torch.testing.assert_close(place(x), h + torch.relu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def test_adalora_ends_at_its_budget(tmp_path: Path) -> None:
    method = AdaLora(rank=2, initial_rank=6, every_steps=1, warmup=0.1, settled=0.3)
    run = trained(method)
    values = [p for n, p in run.model.named_parameters() if ".lora_E." in n]
    kept = sum(int((v != 0).sum()) for v in values)
    assert kept == 2 * len(values)


def test_prompt_tuning_begins_with_its_text() -> None:
    tokenizer, model = make_tokenizer(), make_model("llama")
    adapted = adaptation(PromptTuning(num_virtual_tokens=5, init_text="What is"), tokenizer).attach(model, 0)
    ids = (tokenizer("What is", add_special_tokens=False)["input_ids"] * 5)[:5]
    assert torch.equal(adapted.get_prompt(1)[0], model.get_input_embeddings()(torch.tensor(ids)))


@pytest.mark.parametrize(
    ("architecture", "method", "says"),
    [
        ("llama", AdaLora(rank=20, initial_rank=40), "method.rank is 40, more than the smaller side"),
        ("llama", IA3(targets=("q_porj",)), "Did you mean 'q_proj'"),
        ("opt", LlamaAdapter(), "not 'opt'"),
        ("llama", LlamaAdapter(num_layers=9), "the model has 3 layers"),
    ],
)
def test_what_does_not_fit_the_architecture(architecture: str, method: Method, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        adaptation(method).check(make_model(architecture))


def test_held_out_loss_of_a_learnt_prompt_is_finite() -> None:
    model = trained(METHODS["prompt"]).model
    assert 0 < held_out_loss(model, rows(6), 64, 0).loss < 20
