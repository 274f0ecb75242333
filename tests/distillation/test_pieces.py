"""A teacher of another tokenizer: pieces of text that both have, the loss on them against plain PyTorch, and several workers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedTokenizerFast

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.contracts.jobs import DistillJob, TrainSpec
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.methods import Full
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.data.encoding import Encoded, encode_all
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.data.parsing import parse_row
from adaptfleet.core.data.tokens import Rows, TokenFile, record_batch, write_tokens
from adaptfleet.core.distill.compatibility import check_pieces
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.pieces import PieceDistillation, TextTeacher
from adaptfleet.core.distill.shared_text import SharedPieces, TokenBytes, shared_pieces
from adaptfleet.core.distill.teachers import OnlineTeacher
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.packed_forward import PackedBatch
from adaptfleet.core.sharding import shard, worker_mesh
from adaptfleet.core.steps import plan_steps
from adaptfleet.on_ray.train.run_folder import RunFolder
from tests.distillation.conftest import make_llama, make_other_tokenizer
from tests.training.conftest import VOCABULARY, make_tokenizer
from tests.workers import meeting, run_workers

STEPS = 5


def make_sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is a letter of its own, what has no letter is written in bytes."""
    letters = ["▁", *"abcdefghilmnoprstuwWI?,.0123456789"]
    merges = [("▁", "t"), ("▁t", "w"), ("▁tw", "o"), ("▁", "i"), ("▁i", "s")]
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    fast.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    return fast


def pieces_of(text: str, mine: Any, theirs: Any) -> tuple[SharedPieces, Encoded, Encoded]:
    example = parse_row({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]})
    a, b = (encode_all([example], tokenizer, 2000)[0] for tokenizer in (mine, theirs))
    return shared_pieces(a, b, TokenBytes(mine, "a"), TokenBytes(theirs, "b")), a, b


def spelled(row: Encoded, piece_N: Any, tokenizer: Any) -> list[bytes]:
    """The bytes of each piece; of what ends an answer none."""
    token_bytes = TokenBytes(tokenizer, "a")
    labelled = [token for token, counts in zip(row.input_ids, row.label_mask, strict=True) if counts]
    texts = [b""] * (max(piece_N.tolist()) + 1)
    for token, piece in zip(labelled, piece_N.tolist(), strict=True):
        if piece >= 0:
            texts[piece] += token_bytes(token) or b""
    return texts


def test_pieces_by_hand() -> None:
    mine, theirs = make_tokenizer(), make_other_tokenizer()
    found, a, b = pieces_of("It is two?", mine, theirs)
    assert mine.convert_ids_to_tokens([i for i, counts in zip(a.input_ids, a.label_mask, strict=True) if counts]) == [
        "It", "Ġis", "Ġtwo", "?", "<|im_end|>",
    ]  # fmt: skip
    assert theirs.convert_ids_to_tokens([i for i, counts in zip(b.input_ids, b.label_mask, strict=True) if counts]) == [
        "It", "Ġ", "i", "s", "Ġ", "two?", "</s>",
    ]  # fmt: skip
    # "Ġtwo" + "?" against "Ġ" + "two?": no place in between is in both
    assert found.mine_N.tolist() == [0, 1, 2, 2, 3]
    assert found.theirs_M.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert found.count == 4


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(lambda text: text == text.strip()))
def test_pieces_are_the_same_bytes_on_both_sides_and_leave_nothing_out(text: str) -> None:
    for mine, theirs in ((TOKENIZERS[0], TOKENIZERS[1]), (TOKENIZERS[1], TOKENIZERS[2]), (TOKENIZERS[2], TOKENIZERS[0])):
        found, a, b = pieces_of(text, mine, theirs)
        my_texts, their_texts = spelled(a, found.mine_N, mine), spelled(b, found.theirs_M, theirs)
        assert [piece.strip(b" ") for piece in my_texts] == [piece.strip(b" ") for piece in their_texts]
        assert b"".join(my_texts).decode().strip() == text
        assert len(my_texts) == found.count
        for numbers in (found.mine_N, found.theirs_M):
            assert (numbers >= 0).all() and (numbers[1:] - numbers[:-1] >= 0).all() and set(numbers.tolist()) == set(range(found.count))


TOKENIZERS = (make_tokenizer(), make_other_tokenizer(), make_sentence_piece())


def test_a_row_that_one_side_cut_ends_its_pieces_there() -> None:
    mine, theirs = make_tokenizer(), make_other_tokenizer()
    found, a, b = pieces_of("It is two? It is three.", mine, theirs)
    cut = Encoded(b.input_ids[:-4], b.label_mask[:-4])
    shorter = shared_pieces(a, cut, TokenBytes(mine, "a"), TokenBytes(theirs, "b"))
    assert 0 < shorter.count < found.count
    numbers = shorter.mine_N.tolist()
    assert numbers[-1] == -1 and numbers[: len(numbers) // 2] == found.mine_N.tolist()[: len(numbers) // 2]


def test_several_answers_are_laid_over_each_other_one_by_one() -> None:
    mine, theirs = make_tokenizer(), make_other_tokenizer()
    turns = [("user", "one"), ("assistant", "It is one."), ("user", "two"), ("assistant", "It is two.")]
    example = parse_row({"messages": [{"role": role, "content": content} for role, content in turns]})
    a, b = (encode_all([example], tokenizer, 2000)[0] for tokenizer in (mine, theirs))
    found = shared_pieces(a, b, TokenBytes(mine, "a"), TokenBytes(theirs, "b"))
    assert b"".join(spelled(a, found.mine_N, mine)) == b"It is one.It is two." and (found.mine_N >= 0).all()


def spec(**values: Any) -> Distillation:
    return Distillation(teacher=ModelSpec(), unit="piece", **values)


def rows(tokenizer: Any, num: int = 12) -> list[Encoded]:
    examples = [parse_row({"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}, or so."}) for i in range(num)]
    return encode_all(examples, tokenizer, 256)


def packed(data: list[Encoded], num_tokens: int = 256) -> PackedBatch:
    arrays = [pack_arrays(Pack(tuple(range(len(data)))), data, num_tokens, 0)]
    return replace(PackedBatch.stack(arrays, torch.device("cpu")), rows=tuple(range(len(data))))


def distiller(s: Distillation, teacher: Any, num: int = 12, tokenizer: Any = None, call: Any = None) -> PieceDistillation:
    """Of a student with the tests' tokenizer."""
    mine, theirs = make_tokenizer(), tokenizer or make_other_tokenizer()
    read = TextTeacher(teacher, rows(theirs, num), 100, 0, call)
    return PieceDistillation(s, read, rows(mine, num), TokenBytes(mine, "a"), TokenBytes(theirs, "b"))


def label_log_probs(model: Any, row: Encoded) -> torch.Tensor:
    ids = torch.tensor([row.input_ids])
    log_probs = F.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
    return log_probs.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(row.label_mask[1:])]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_loss_and_its_gradients_are_the_formulas(divergence: Any, temperature: float) -> None:
    s, num = spec(divergence=divergence, temperature=temperature, alpha=0.3), 4
    student, teacher = make_llama("student").requires_grad_(True), make_llama("teacher", 360)
    objective = distiller(s, teacher, num)
    ours = objective.summed_loss(student, packed(rows(make_tokenizer(), num)))
    ours.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    total = torch.zeros(())
    for a, b in zip(rows(make_tokenizer(), num), rows(make_other_tokenizer(), num), strict=True):
        pieces = shared_pieces(a, b, TokenBytes(make_tokenizer(), "a"), TokenBytes(make_other_tokenizer(), "b"))
        mine, theirs = label_log_probs(student, a), label_log_probs(teacher, b).detach()
        for piece in range(pieces.count):
            p = (theirs[torch.from_numpy(pieces.theirs_M == piece)].sum() / temperature).exp()
            q = (mine[torch.from_numpy(pieces.mine_N == piece)].sum() / temperature).exp()
            both = [(p, q), (1 - p, 1 - q)]
            if divergence == "forward_kl":
                value = sum(x * (x / y).log() for x, y in both)
            elif divergence == "reverse_kl":
                value = sum(y * (y / x).log() for x, y in both)
            else:
                value = sum(0.5 * x * (2 * x / (x + y)).log() + 0.5 * y * (2 * y / (x + y)).log() for x, y in both)
            total = total + 0.3 * temperature * value
        total = total - 0.7 * mine.sum()
    total.backward()
    assert float(ours.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert found
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, rtol=2e-3, atol=2e-4 * float(parameter.grad.abs().max())), name


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = make_llama("teacher").requires_grad_(True)
    loss = distiller(spec(alpha=1.0), make_llama("teacher"), 4, make_tokenizer()).summed_loss(student, packed(rows(make_tokenizer(), 4)))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-3)
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-3


def test_rows_without_labels_add_nothing() -> None:
    student = make_llama("student").requires_grad_(True)
    batch = packed(rows(make_tokenizer(), 2))
    loss = distiller(spec(), make_llama("teacher", 360)).summed_loss(
        student, replace(batch, label_mask_BT=torch.zeros_like(batch.label_mask_BT))
    )
    loss.backward()
    assert float(loss.detach()) == 0


def make_trainer(mode: str, num_workers: int) -> Trainer:
    # three packs a step: two workers cannot share them evenly
    train = TrainSpec(epochs=20, max_steps=STEPS, pack_tokens=100, packs_per_step=3, learning_rate=0.01)
    adapted = adaptation(Full())
    student, teacher = adapted.attach(make_llama("student"), 0), make_llama("teacher", 360)
    sharded = mode == "fsdp2"
    call = shard(student, worker_mesh("cpu", num_workers, 1)) if sharded else None
    objective = distiller(spec(temperature=5.0), teacher, call=shard(teacher, worker_mesh("cpu", num_workers, 1)) if sharded else None)
    data = rows(make_tokenizer())
    return Trainer(student, adapted, train, plan_steps(data, train), data, 0, objective, call)


def work(rank: int, num_workers: int, folder: Path, mode: str) -> None:
    with meeting(folder / "meet", rank, num_workers):
        trainer = make_trainer(mode, num_workers)
        losses = [result.loss for result in trainer.run()]
        if rank == 0:
            (folder / f"{mode}.json").write_text(json.dumps(losses))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_workers_have_the_losses_of_one(mode: str, tmp_path: Path) -> None:
    run_workers(work, 1, 1, tmp_path, "none")
    run_workers(work, 2, 2, tmp_path, mode)
    one, two = (json.loads((tmp_path / f"{m}.json").read_text()) for m in ("none", mode))
    # sums in another order; AdamW divides by their size, so the difference grows a little with each step
    assert two == pytest.approx(one, rel=2e-3) and two[0] == pytest.approx(one[0], rel=1e-5) and one[-1] < one[0]


def test_a_student_comes_nearer_to_what_the_teacher_finds_likely() -> None:
    """Not to the data: the loss is of the teacher alone, and its distance to the teacher's own token by token falls too."""
    teacher, student = make_llama("teacher"), adaptation(Full()).attach(make_llama("student"), 0)
    data = rows(make_tokenizer())
    train = TrainSpec(epochs=30, max_steps=30, pack_tokens=256, packs_per_step=2, learning_rate=0.01)
    objective = distiller(spec(alpha=1.0), teacher, tokenizer=make_tokenizer())
    judge = KnowledgeDistillation(
        Distillation(teacher=ModelSpec(), alpha=1.0), OnlineTeacher(make_llama("teacher"), spec(), VOCABULARY), student
    )
    before = float(judge.summed_loss(student, packed(data, 512)).detach())
    losses = [r.loss for r in Trainer(student, adaptation(Full()), train, plan_steps(data, train), data, 0, objective).run()]
    assert losses[-1] < 0.5 * losses[0]
    assert float(judge.summed_loss(student, packed(data, 512)).detach()) < before


def test_a_run_keeps_both_tokenizations_of_its_rows_also_where_they_are_one_file(fresh_home: Path) -> None:
    job = parse_contract(DistillJob, "objective: {teacher: {}, unit: piece}\npublish: {name: a}\n")
    data = rows(make_tokenizer(), 3)
    write_tokens(fresh_home / "tokens.arrow", [record_batch(data)])
    both = Rows([TokenFile(fresh_home / "tokens.arrow")], np.asarray([2, 0]))
    folder = RunFolder.open(job)
    for _ in range(2):
        folder.write_rows(both, both[:1], plan_steps(both, job.train), [], both)
    for found in (folder.read_rows("train"), folder.read_rows("train", "teacher_files")):
        assert [row.input_ids.tolist() for row in found] == [data[2].input_ids, data[0].input_ids]


def test_a_tokenizer_that_is_no_text_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="'words' is neither byte-level BPE nor SentencePiece"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words), "words")


def test_rows_whose_answers_part_are_refused() -> None:
    mine, theirs = make_tokenizer(), make_other_tokenizer()
    sides = TokenBytes(mine, "a"), TokenBytes(theirs, "b")
    check_pieces(rows(mine), rows(theirs), *sides, "loud")
    quiet, loud = ([parse_row({"prompt": "and?", "completion": answer})] for answer in ("it is so.", "IT IS SO."))
    with pytest.raises(ModelError, match=r"only 0 of 8 answer tokens of the first 1 rows .* 'loud'"):
        check_pieces(encode_all(quiet, mine, 256), encode_all(loud, theirs, 256), *sides, "loud")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective={teacher: {}, unit: piece, align: {hidden: 1.0}}", "models of two tokenizers do not share"),
        ("objective={teacher: {}, unit: piece, source: {kind: offline}}", "with unit piece use online"),
        ("objective={teacher: {}, unit: piece, source: {kind: on_policy}}", "with unit piece use online"),
        ("objective={teacher: {}, unit: word}", "token.*piece"),
    ],
)
def test_contracts_that_cannot_be(override: str, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        parse_contract(DistillJob, "objective: {teacher: {}}\npublish: {name: a}\n", [override])
