"""Distillation on packed rows and on the loop: against whole logits of separate rows, layers, and several workers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from adaptfleet.contracts.distillation import Alignment, Distillation
from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import Full, Lora
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.data.encoding import Encoded, encode_all
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.data.parsing import parse_row
from adaptfleet.core.distill.compatibility import check_alignment, check_vocabularies
from adaptfleet.core.distill.layers import layer_map
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.teachers import OnlineTeacher
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.packed_forward import PackedBatch
from adaptfleet.core.sharding import shard, worker_mesh
from adaptfleet.core.steps import plan_steps
from tests.distillation.conftest import make_llama
from tests.training.conftest import VOCABULARY, make_model, make_tokenizer
from tests.workers import meeting, run_workers

STEPS = 5


def spec(**values: Any) -> Distillation:
    return Distillation(teacher=ModelSpec(), **values)


def rows(num: int = 12) -> list[Encoded]:
    examples = [parse_row({"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}, or so."}) for i in range(num)]
    return encode_all(examples, make_tokenizer(), 256)


def packed(data: list[Encoded], num_tokens: int = 200) -> PackedBatch:
    return PackedBatch.stack([pack_arrays(Pack(tuple(range(len(data)))), data, num_tokens, 0)], torch.device("cpu"))


def distiller(s: Distillation, student: Any, teacher: Any) -> KnowledgeDistillation:
    return KnowledgeDistillation(s, OnlineTeacher(teacher, s, VOCABULARY), student)


@pytest.mark.parametrize("shape", ["student", "narrow"])
def test_packed_rows_give_what_separate_rows_give(shape: str) -> None:
    s, data, student, teacher = spec(temperature=2.0, alpha=0.3), rows(4), make_llama(shape), make_llama("teacher")
    ours = distiller(s, student, teacher).summed_loss(student, packed(data))
    total = 0.0
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row.input_ids])
            of_student, of_teacher = (model(input_ids=ids, use_cache=False).logits[0, :-1] for model in (student, teacher))
            labelled = torch.tensor(row.label_mask[1:])
            q, p = (F.log_softmax(logits[labelled] / 2.0, -1) for logits in (of_student, of_teacher))
            total += 0.3 * 4.0 * float(F.kl_div(q, p, reduction="sum", log_target=True))
            total += 0.7 * float(F.cross_entropy(of_student[labelled], ids[0, 1:][labelled], reduction="sum"))
    assert float(ours) == pytest.approx(total, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    s = spec(alpha=1.0, align=Alignment(hidden=1.0, attention=1.0))
    student = adaptation(Lora(rank=4)).attach(make_llama("teacher"), 0)
    loss = distiller(s, student, make_llama("teacher")).summed_loss(student, packed(rows(3)))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-3)
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-4


def test_aligned_layers_are_measured_as_their_formulas_say() -> None:
    align = Alignment(hidden=0.5, attention=2.0, layers={0: 1, 1: 3})
    student, teacher, data = make_llama("student"), make_llama("teacher"), rows(3)
    whole, alone = (float(distiller(spec(align=a), student, teacher).summed_loss(student, packed(data))) for a in (align, Alignment()))
    total = 0.0
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row.input_ids])
            labelled = torch.tensor([*row.label_mask[1:], False])
            mine, theirs = (
                m(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True) for m in (student, teacher)
            )
            for i, j in ((0, 1), (1, 3)):
                last = i == 1  # the last hidden state of transformers' list stands after the norm
                if not last:
                    h, t = mine.hidden_states[i + 1][0][labelled], theirs.hidden_states[j + 1][0][labelled]
                    total += 0.5 * float(((h - t).square().sum(-1) / t.square().sum(-1)).sum())
                a, b = (x.mean(1)[0][labelled] for x in (mine.attentions[i], theirs.attentions[j]))
                total += 2.0 * float((b * (b.clamp_min(1e-12).log() - a.clamp_min(1e-12).log())).sum())
    only_first = spec(align=Alignment(hidden=0.5, layers={1: 3}))
    last_pair = float(distiller(only_first, student, teacher).summed_loss(student, packed(data))) - alone
    assert whole - alone == pytest.approx((total + last_pair) / 2, rel=1e-3)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gpt_neox", "opt"])
def test_layers_of_other_architectures_are_found(architecture: str) -> None:
    s, data = spec(alpha=0.5, align=Alignment(hidden=1.0, attention=1.0)), rows(2)
    student = adaptation(Full()).attach(make_model(architecture), 0)
    alone = KnowledgeDistillation(spec(alpha=0.5), OnlineTeacher(make_model(architecture), spec(), VOCABULARY), student)
    plain = float(alone.summed_loss(student, packed(data)).detach())
    aligned = [
        float(distiller(s, student, make_model(architecture, seed)).summed_loss(student, packed(data)).detach()) - plain for seed in (0, 1)
    ]
    assert aligned[0] == pytest.approx(0.0, abs=plain * 1e-4) and aligned[1] > 1.0


@pytest.mark.parametrize(("student", "teacher", "pairs"), [(2, 4, {0: 1, 1: 3}), (3, 3, {0: 0, 1: 1, 2: 2}), (2, 5, {0: 1, 1: 4})])
def test_layers_are_spread_evenly_and_the_last_meet(student: int, teacher: int, pairs: dict[int, int]) -> None:
    assert layer_map(Alignment(), student, teacher) == pairs


def make_trainer(s: Distillation, method: Full | Lora, mode: str, num_workers: int) -> Trainer:
    # three packs a step: two workers cannot share them evenly
    train = TrainSpec(epochs=20, max_steps=STEPS, pack_tokens=64, packs_per_step=3, learning_rate=0.01)
    adapted = adaptation(method)
    student, teacher = adapted.attach(make_llama("student"), 0), make_llama("teacher")
    sharded = mode == "fsdp2"
    call = shard(student, worker_mesh("cpu", num_workers, 1)) if sharded else None
    online = OnlineTeacher(teacher, s, VOCABULARY, shard(teacher, worker_mesh("cpu", num_workers, 1)) if sharded else None)
    data = rows()
    return Trainer(student, adapted, train, plan_steps(data, train), data, 0, KnowledgeDistillation(s, online, student), call)


def work(rank: int, num_workers: int, folder: Path, s: str, mode: str) -> None:
    with meeting(folder / "meet", rank, num_workers):
        trainer = make_trainer(Distillation.model_validate_json(s, strict=False), Full(), mode, num_workers)
        losses = [result.loss for result in trainer.run()]
        weights = trainer.optimizer.whole_weights()
        if rank == 0:
            total = sum(float(weight.double().abs().sum()) for weight in weights.values())
            (folder / f"{mode}.json").write_text(json.dumps({"losses": losses, "sum": total}))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_workers_have_the_losses_of_one(mode: str, tmp_path: Path) -> None:
    s = spec(divergence="jsd", temperature=1.5, align=Alignment(hidden=0.3, attention=0.3)).model_dump_json()
    run_workers(work, 1, 1, tmp_path, s, "none")
    run_workers(work, 2, 2, tmp_path, s, mode)
    one, two = (json.loads((tmp_path / f"{m}.json").read_text()) for m in ("none", mode))
    # sums in another order; AdamW divides by their size, so the difference grows a little with each step
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3) and two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
    assert two["sum"] == pytest.approx(one["sum"], rel=2e-3) and one["losses"][-1] < one["losses"][0]


def test_the_student_comes_near_its_teacher_and_holds_nothing_of_it() -> None:
    trainer = make_trainer(spec(alpha=1.0), Full(), "none", 1)
    trainer.train = replace_train(trainer.train, learning_rate=0.02)
    losses = [result.loss for result in trainer.run()]
    assert losses[-1] < 0.8 * losses[0]
    student = {f"{kind}.{name}" for name, _ in make_llama("student").named_parameters() for kind in ("weight", "exp_avg", "exp_avg_sq")}
    assert set(trainer.state()) == student | {"updates"}
    teacher = trainer.objective.teacher.model
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), make_llama("teacher").parameters(), strict=True))


def replace_train(train: TrainSpec, **values: Any) -> TrainSpec:
    return train.model_copy(update=values)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    student, other = make_tokenizer(), make_tokenizer()
    check_vocabularies(student, other, "teacher")
    other.add_tokens(["<|tool|>"])
    with pytest.raises(
        ModelError, match=r"another vocabulary .* 280 and 279 tokens, of which 1 differ, such as '<\|tool\|>' \(none of the student"
    ):
        check_vocabularies(student, other, "teacher")


def test_layers_that_are_not_there_and_widths_that_differ_are_told_together() -> None:
    align = Alignment(hidden=1.0, layers={5: 1, 0: 9})
    with pytest.raises(ContractError) as refused:
        check_alignment(align, make_llama("narrow").config, make_llama("teacher").config)
    for fact in ("layers 5 of the student, which has 0 to 1", "layers 9 of the teacher", "the student has 24 and the teacher 32"):
        assert fact in str(refused.value)


def test_rows_without_labels_add_nothing() -> None:
    s, student = spec(), make_llama("student")
    batch = packed(rows(2))
    idle = replace(batch, label_mask_BT=torch.zeros_like(batch.label_mask_BT))
    assert float(distiller(s, student, make_llama("teacher")).summed_loss(student, idle)) == 0
