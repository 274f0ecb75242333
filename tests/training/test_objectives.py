"""Preferences: the losses against their formulas on unpacked rows, the data's way into pairs, and what training does to them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from adaptfleet.contracts.errors import ContractError, DataError
from adaptfleet.contracts.jobs import FinetuneJob, TrainSpec
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.methods import AdaLora, Lora, Method, PrefixTuning
from adaptfleet.contracts.objectives import Dpo, Orpo
from adaptfleet.core.data.encoding import Encoded, encode, encode_all
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.data.parsing import BadRowError, parse_row
from adaptfleet.core.data.tokens import Rows, TokenFile, record_batch, write_tokens
from adaptfleet.core.evaluation.held_out import held_out_preferences
from adaptfleet.core.loop import Trainer
from adaptfleet.core.losses import CHUNK_POSITIONS, token_log_probs
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.objectives import DirectPreference, OddsRatioPreference, Preference, objective
from adaptfleet.core.packed_forward import PackedBatch
from adaptfleet.core.steps import plan_steps
from tests.training.conftest import make_model, make_tokenizer

ROW = {"prompt": "Two and two?", "chosen": "It is four.", "rejected": "It is five."}


def pairs(num: int = 6) -> list[Encoded]:
    rows = [
        parse_row({"prompt": f"What is {i} and one?", "chosen": f"It is {i + 1}.", "rejected": f"I think that it is {i}, or so."})
        for i in range(num)
    ]
    return encode_all(rows, make_tokenizer(), 256)


def shaken(method: Method) -> AdaptedModel:
    model = adaptation(method).attach(make_model("llama"), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch(rows: list[Encoded]) -> PackedBatch:
    return PackedBatch.stack([pack_arrays(Pack(tuple(range(len(rows)))), rows, 512, 0)], torch.device("cpu"))


def log_prob(model: torch.nn.Module, ids: list[int], mask: list[bool]) -> tuple[float, int]:
    """Of the labelled tokens of one conversation, by the model's own forward."""
    with torch.no_grad():
        log_probs = F.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), dim=-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]), sum(mask[1:])


def sides(row: Encoded) -> list[tuple[list[int], list[bool]]]:
    return [(row.input_ids[part], row.label_mask[part]) for part in (slice(0, row.split), slice(row.split, None))]


@pytest.mark.parametrize("num_positions", [1, CHUNK_POSITIONS + 3])
def test_token_log_probs_equal_pytorch(num_positions: int) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_positions, 16, requires_grad=True)
    weight_VD, labels_N, weights_N = torch.randn(50, 16), torch.randint(0, 50, (num_positions,)), torch.randn(num_positions)
    ours = token_log_probs(hidden_ND, weight_VD, None, labels_N)
    (ours * weights_N).sum().backward()
    our_grad, hidden_ND.grad = hidden_ND.grad, None
    reference = F.log_softmax(hidden_ND @ weight_VD.T, dim=-1).gather(1, labels_N[:, None]).squeeze(1)
    (reference * weights_N).sum().backward()
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_grad, hidden_ND.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [Lora(rank=4), PrefixTuning(num_virtual_tokens=3), AdaLora(rank=2, initial_rank=4)], ids=lambda m: m.kind
)
def test_dpo_is_its_formula(method: Method) -> None:
    model, base, rows = shaken(method), make_model("llama"), pairs()
    losses, margins = DirectPreference(Dpo(beta=0.3)).losses_and_margins(model, batch(rows))
    forward = model.get_base_model() if method.kind == "adalora" else model
    for row, loss, margin in zip(rows, losses.tolist(), margins.tolist(), strict=True):
        rewards = [0.3 * (log_prob(forward, *side)[0] - log_prob(base, *side)[0]) for side in sides(row)]
        assert margin == pytest.approx(rewards[0] - rewards[1], rel=1e-3, abs=1e-4)
        assert loss == pytest.approx(math.log1p(math.exp(rewards[1] - rewards[0])), rel=1e-3)


def test_dpo_begins_at_log_two() -> None:
    model = adaptation(Lora(rank=4)).attach(make_model("llama"), 0)
    losses, margins = DirectPreference(Dpo()).losses_and_margins(model, batch(pairs()))
    assert torch.allclose(losses, torch.full_like(losses, math.log(2))) and (margins == 0).all()
    smoothed, _ = DirectPreference(Dpo(label_smoothing=0.2)).losses_and_margins(shaken(Lora(rank=4)), batch(pairs()))
    assert (smoothed > 0).all()


def test_orpo_is_its_formula() -> None:
    model, rows = shaken(Lora(rank=4)), pairs()
    losses, _ = OddsRatioPreference(Orpo(weight=0.5)).losses_and_margins(model, batch(rows))
    for row, loss in zip(rows, losses.tolist(), strict=True):
        (chosen, n), (rejected, m) = (log_prob(model, *side) for side in sides(row))
        odds = [p - math.log1p(-math.exp(p)) for p in (chosen / n, rejected / m)]
        assert loss == pytest.approx(-chosen / n + 0.5 * math.log1p(math.exp(odds[1] - odds[0])), rel=1e-3)


@pytest.mark.parametrize("spec", [Dpo(beta=0.5), Orpo(weight=1.0)], ids=lambda spec: spec.kind)
def test_training_learns_what_is_preferred(spec: Dpo | Orpo) -> None:
    rows, adapted, wanted = pairs(12), adaptation(Lora(rank=4)), objective(spec)
    assert isinstance(wanted, Preference)
    model = adapted.attach(make_model("llama"), 0)
    train = TrainSpec(epochs=8, pack_tokens=256, packs_per_step=2, learning_rate=0.01)
    before = held_out_preferences(model, wanted, rows, 256, 0)
    curve = [r.loss for r in Trainer(model, adapted, train, plan_steps(rows, train), rows, 0, wanted).run()]
    after = held_out_preferences(model, wanted, rows, 256, 0)
    assert curve[-1] < curve[0] and after["eval_loss"] < before["eval_loss"]
    assert after["preference_accuracy"] == 1.0 and after["preference_margin"] > before["preference_margin"]


def test_a_pair_is_two_examples_in_every_way() -> None:
    tokenizer = make_tokenizer()
    pair = encode(parse_row(ROW), tokenizer, 256)
    alone = [encode(parse_row({"prompt": ROW["prompt"], "completion": ROW[side]}), tokenizer, 256) for side in ("chosen", "rejected")]
    assert pair.split == len(alone[0]) and pair.input_ids == alone[0].input_ids + alone[1].input_ids
    packed = pack_arrays(Pack((0,)), [pair], 200, 0)
    apart = pack_arrays(Pack((0, 1)), alone, 200, 0)
    for name, array in apart.items():
        assert np.array_equal(packed[name], array), name


def test_pairs_come_back_from_a_token_file(tmp_path: Path) -> None:
    rows = pairs()
    write_tokens(tmp_path / "tokens.arrow", [record_batch(rows[:2]), record_batch(rows[2:])])
    read = Rows([TokenFile(tmp_path / "tokens.arrow")], np.arange(len(rows)))
    for row, kept in zip(rows, read, strict=True):
        assert (kept.input_ids.tolist(), kept.label_mask.tolist(), kept.split) == (row.input_ids, row.label_mask, row.split)


def test_prompt_and_answers_may_be_messages() -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Two and two?"}]
    row = {"prompt": messages, "chosen": [{"role": "assistant", "content": "4"}], "rejected": "5"}
    example = parse_row(row)
    assert example.answer == "4" and example.rejected == "5" and len(example.prompt) == 2
    assert parse_row(example.as_row()) == example and parse_row(parse_row(ROW).as_row()) == parse_row(ROW)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rejected": "It is four."}, "nothing is preferred"),
        ({"chosen": ""}, "chosen is empty"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "must be the assistant's answer"),
        ({"completion": "x"}, "`prompt`, `chosen` and `rejected`"),
    ],
)
def test_rows_that_are_no_preference(change: dict[str, object], says: str) -> None:
    with pytest.raises(BadRowError, match=says):
        parse_row(ROW | change)


def test_a_pair_longer_than_a_pack_is_told_with_what_it_needs() -> None:
    with pytest.raises(DataError, match=r"Raise train.pack_tokens to \d+"):
        encode_all([parse_row(ROW)], make_tokenizer(), 40)


def test_pairs_and_other_rows_do_not_mix() -> None:
    with pytest.raises(DataError, match="keep the two apart"):
        encode_all([parse_row(ROW), parse_row({"prompt": "a", "completion": "b"})], make_tokenizer(), 256)


@pytest.mark.parametrize("method", ["{kind: full}", "{kind: lora, init: pissa}"])
def test_dpo_needs_the_base_beside_the_method(method: str) -> None:
    with pytest.raises(ContractError, match=r"objective\.kind 'dpo' measures against the base"):
        parse_contract(FinetuneJob, "publish: {name: a}", [f"method={method}", "objective={kind: dpo}"])
