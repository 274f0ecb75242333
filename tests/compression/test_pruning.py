"""A pruned model is a plain smaller one that computes what the whole one computes without the units that were taken."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adaptfleet.contracts.compression import Prune
from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.core.pruning.importance import MEASURES, Importance, measure
from adaptfleet.core.pruning.layout import head_size, layout_of, num_groups, planned_sizes
from adaptfleet.core.pruning.refit import fitted, refit
from adaptfleet.core.pruning.slicing import Kept, choose, sliced
from tests.compression.conftest import CONFIGS, make_model, make_rows
from tests.training.conftest import make_model as make_plain_model

IDS = torch.tensor([[5, 17, 200, 3, 99, 250, 7, 42, 42, 11]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def kept(model: PreTrainedModel, spec: Prune) -> Kept:
    return choose(model.config, spec, measure(model, make_rows(4), pad_id=0))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_taken_is_the_same_model(name: str) -> None:
    model = make_model(name)
    same = sliced(model, kept(model, Prune()))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[key]), key
    assert torch.equal(logits(model), logits(same))


def masked(model: PreTrainedModel, left: Kept) -> PreTrainedModel:
    """The whole model with the weights of the taken units zeroed."""
    layout, config = layout_of(model.config), model.config
    size, each = head_size(config), config.num_attention_heads // num_groups(config)
    for i, block in enumerate(layout.blocks(model)):
        taken = [c for c in range(getattr(config, layout.width_key)) if c not in left.mlp[i]]
        heads = [g * each * size + j for g in range(num_groups(config)) if g not in left.kv_groups[i] for j in range(each * size)]
        block.get_submodule(layout.mlp_out).weight.data[:, taken] = 0
        block.get_submodule(layout.attention_out).weight.data[:, heads] = 0
    return model


CASES = [(name, Prune(mlp_width=0.3)) for name in CONFIGS] + [("llama", Prune(mlp_width=0.3, importance=m)) for m in MEASURES[1:]]
CASES += [(name, Prune(mlp_width=0.5, kv_groups=1)) for name in ("llama", "llama with biases", "mistral", "qwen3")]


@pytest.mark.parametrize(("name", "spec"), CASES, ids=str)
def test_it_equals_the_masked_model(name: str, spec: Prune, tmp_path: Path) -> None:
    model = make_model(name)
    left = kept(model, spec)
    smaller = sliced(model, left)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.num_attention_heads == model.config.num_attention_heads // 2 * (1 if spec.kv_groups else 2)
    # sums of the same numbers in another order
    torch.testing.assert_close(logits(loaded), logits(masked(model, left)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama with biases", "mistral", "qwen3"])
def test_a_narrower_stream_equals_the_masked_one(name: str) -> None:
    """Zero channels count in the whole model's norms: the roots of their means differ by the root of the widths' ratio."""
    model = make_model(name)
    left = kept(model, Prune(hidden_width=0.5, round_to=32))
    smaller = sliced(model, left)
    layout = layout_of(model.config)
    taken = [d for d in range(64) if d not in left.hidden]
    model.get_submodule(layout.embedding).weight.data[:, taken] = 0
    for block in layout.blocks(model):
        for writer in (layout.attention_out, layout.mlp_out):
            module = block.get_submodule(writer)
            module.weight.data[taken] = 0
            if module.bias is not None:
                module.bias.data[taken] = 0
        for norm in layout.norms:
            block.get_submodule(norm).weight.data *= (32 / 64) ** 0.5
    model.get_submodule(layout.last_norm).weight.data *= (32 / 64) ** 0.5
    assert len(left.hidden) == 32
    # the norm's epsilon is not scaled with them
    torch.testing.assert_close(logits(smaller), logits(model), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_do_nothing_go_first_and_cost_nothing(name: str) -> None:
    model = make_model(name)
    layout = layout_of(model.config)
    block = list(layout.blocks(model))[1]
    for writer in (layout.attention_out, layout.mlp_out):
        for parameter in block.get_submodule(writer).parameters():
            parameter.data.zero_()
    left = kept(model, Prune(layers=1))
    assert left.layers == [0, 2]
    torch.testing.assert_close(logits(sliced(model, left)), logits(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_others_tell_is_refitted(name: str) -> None:
    """Every second channel says what its neighbour says: the neighbours take its weight over, and nothing is lost but the ridge."""
    model = make_model(name)
    layout = layout_of(model.config)
    for block in layout.blocks(model):
        for reader in layout.mlp_in:
            linear = block.get_submodule(reader)
            linear.weight.data[1::2] = linear.weight.data[::2]
            if linear.bias is not None:
                linear.bias.data[1::2] = linear.bias.data[::2]
    whole, config = logits(model), model.config
    groups = list(range(num_groups(config)))
    left = Kept([list(range(0, 192, 2))] * 3, [groups] * 3, list(range(64)), [0, 1, 2])
    cut = (logits(sliced(model, left)) - whole).norm() / whole.norm()
    refit(model, left, make_rows(12), pad_id=0)
    healed = (logits(sliced(model, left)) - whole).norm() / whole.norm()
    assert healed < 0.15 * cut, (healed, cut)


def test_a_refit_is_the_least_squares_one() -> None:
    torch.manual_seed(0)
    x, weight, keep = torch.randn(500, 12), torch.randn(5, 12), [0, 2, 3, 7, 8, 11]
    x[:, 1] += 2 * x[:, 0] - x[:, 7]
    best = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    # the ridge is a hundredth of the inputs' mean square
    torch.testing.assert_close(fitted(weight, x.T @ x, keep).float(), best, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("importance", MEASURES)
def test_units_without_weights_go_first_and_cost_nothing(importance: str) -> None:
    model = make_model("llama")
    for block in layout_of(model.config).blocks(model):
        block.mlp.up_proj.weight.data[::3] = 0
        block.mlp.gate_proj.weight.data[::3] = 0
        block.mlp.down_proj.weight.data[:, ::3] = 0
    left = kept(model, Prune(mlp_width=1 / 3, importance=importance))  # type: ignore[arg-type]
    assert all(c % 3 for channels in left.mlp for c in channels)
    torch.testing.assert_close(logits(sliced(model, left)), logits(model), atol=1e-5, rtol=1e-5)


def test_taylor_scores_are_what_taking_a_unit_costs() -> None:
    """For one token the first-order term is exact as the unit's scale goes to 1: compared with a small step of the scale."""
    model = make_model("llama")
    rows = make_rows(1, 30)
    scores_C = measure(model, rows, pad_id=0).mlp_LC["taylor"][1]
    down = model.model.layers[1].mlp.down_proj
    ids = torch.tensor([rows[0].input_ids])

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    whole = down.weight.data.clone()
    changes = []
    for channel in range(0, 192, 12):
        down.weight.data[:, channel] *= 0.98
        changes.append(abs(loss()))
        down.weight.data.copy_(whole)
    # a unit's score bounds the change from above: |sum over tokens| <= sum over tokens of |.|
    steps = [abs(change - loss()) / 0.02 for change in changes]
    bounds = (scores_C[::12] * 30).tolist()
    assert all(step <= bound * 1.1 + 1e-3 for step, bound in zip(steps, bounds, strict=True))
    assert max(steps) > 0


def test_scores_are_kept_as_they_are(tmp_path: Path) -> None:
    found = measure(make_model("llama"), make_rows(3), pad_id=0)
    found.save(tmp_path / "scores.safetensors")
    again = Importance.load(tmp_path / "scores.safetensors")
    assert torch.equal(again.layers_L, found.layers_L)
    for kind in ("mlp_LC", "kv_groups_LG", "hidden_D"):
        assert all(torch.equal(getattr(again, kind)[m], getattr(found, kind)[m]) for m in MEASURES)


def test_padding_and_neighbours_change_no_score() -> None:
    """Rows are packed; each must count as if it stood alone."""
    model, rows = make_model("llama"), make_rows(2)
    together = measure(model, rows, pad_id=0)
    alone = [measure(model, [row], pad_id=0) for row in rows]
    mean = torch.stack([one.mlp_LC["activation"] for one in alone]).mean(0)
    torch.testing.assert_close(together.mlp_LC["activation"], mean, atol=1e-5, rtol=1e-4)


WIDTHS = [(0.2, 64, 1216), (0.2, 128, 1280), (0.99, 64, 64), (0.01, 64, 1536), (0, 64, 1536)]


@pytest.mark.parametrize(("share", "multiple", "left"), WIDTHS)
def test_widths_are_multiples(share: float, multiple: int, left: int) -> None:
    config = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "intermediate_size": 1536})
    assert planned_sizes(config, Prune(mlp_width=share, round_to=multiple)).mlp_width == left  # type: ignore[arg-type]


def test_what_an_architecture_cannot_lose_is_refused_all_at_once() -> None:
    with pytest.raises(ContractError, match=r"kv_groups is 1, but the engine derives .*; layers is 3, but .*; hidden_width is 0.5"):
        planned_sizes(CONFIGS["qwen2"], Prune(kv_groups=1, layers=3, hidden_width=0.5))
    with pytest.raises(ContractError, match=r"kv_groups is 2, but the model has 2 a layer"):
        planned_sizes(CONFIGS["llama"], Prune(kv_groups=2))


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match=r"type 'gpt2' cannot be pruned yet; known are llama"):
        planned_sizes(make_plain_model("gpt2").config, Prune(mlp_width=0.1))


def test_nothing_of_a_pass_stays_in_memory() -> None:
    """A process that prunes goes on with other work; a ring of a tensor and its own hook is one that no collector sees."""
    model = make_model("llama")
    seen: list[weakref.ref[torch.Tensor]] = []
    layout = layout_of(model.config)
    module = list(layout.blocks(model))[1].get_submodule(layout.mlp_out)

    def watch(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        seen.append(weakref.ref(arguments[0]))

    module.register_forward_pre_hook(watch)
    measure(model, make_rows(3), pad_id=0)
    gc.collect()
    assert seen and all(each() is None for each in seen)
