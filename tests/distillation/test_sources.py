"""Where the teacher's word comes from: kept on disk it gives what it gives beside the student, and answers the student writes itself."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from adaptfleet.contracts.distillation import Distillation, Offline, OnPolicy
from adaptfleet.contracts.errors import DataError, TrainingError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.methods import Full, Lora
from adaptfleet.core.checkpoint import read_progress, read_tensors, write_checkpoint
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.on_policy import OnPolicyDistillation
from adaptfleet.core.distill.sampling import sampled_answers
from adaptfleet.core.distill.teacher_logits import LogitFiles, OfflineTeacher, write_part
from adaptfleet.core.distill.teachers import OnlineTeacher, Teacher
from adaptfleet.core.loop import Trainer
from adaptfleet.core.methods.choice import adaptation
from adaptfleet.core.sharding import shard, worker_mesh
from adaptfleet.core.steps import plan_steps
from tests.distillation.conftest import make_llama
from tests.distillation.test_objective import rows, spec
from tests.training.conftest import VOCABULARY
from tests.workers import meeting, run_workers

TRAIN = TrainSpec(epochs=20, max_steps=4, pack_tokens=64, packs_per_step=2, learning_rate=0.01)


def files_of(folder: Path, s: Distillation, data: list[Any]) -> LogitFiles:
    assert isinstance(s.source, Offline)
    files = LogitFiles(folder, len(data), s.source.rows_per_file)
    for part in files.missing():
        write_part(files, part, make_llama("teacher"), data, s, s.source, VOCABULARY, 64)
    return files


def curve(s: Distillation, teacher: Teacher, data: list[Any]) -> list[float]:
    adapted = adaptation(Full())
    student = adapted.attach(make_llama("student"), 0)
    objective = KnowledgeDistillation(s, teacher, student)
    return [r.loss for r in Trainer(student, adapted, TRAIN, plan_steps(data, TRAIN), data, 0, objective).run()]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_whole_vocabulary_on_disk_is_the_teacher_itself(divergence: str, tmp_path: Path) -> None:
    data, shared = rows(), {"divergence": divergence, "temperature": 1.5, "alpha": 0.8}
    kept = spec(**shared, source=Offline(k=VOCABULARY + 9, precision="float32", rows_per_file=5))
    offline = curve(kept, OfflineTeacher(files_of(tmp_path / "files", kept, data)), data)
    online = curve(spec(**shared), OnlineTeacher(make_llama("teacher"), spec(**shared), VOCABULARY), data)
    # the sums over the vocabulary go by likelihood instead of by id
    assert offline == pytest.approx(online, rel=1e-5)


def test_the_most_likely_tokens_and_the_rest_come_near(tmp_path: Path) -> None:
    data = rows()
    sharp = {"alpha": 1.0, "temperature": 0.25}
    online = curve(spec(**sharp), OnlineTeacher(make_llama("teacher"), spec(**sharp), VOCABULARY), data)
    distances = []
    for k in (4, 32, 128):
        s = spec(**sharp, source=Offline(k=k))
        offline = curve(s, OfflineTeacher(files_of(tmp_path / f"{k}", s, data)), data)
        assert offline[0] <= online[0] * (1 + 1e-3)  # of coarser distributions, at the same weights
        distances.append(abs(online[0] - offline[0]) / online[0])
    assert distances == sorted(distances, reverse=True), distances
    assert distances[1] < 0.1 and distances[2] < 0.02


def test_only_missing_and_torn_files_are_written_again(tmp_path: Path) -> None:
    data, s = rows(), spec(source=Offline(k=8, rows_per_file=5))
    files = files_of(tmp_path / "files", s, data)
    assert [len(files.rows(part)) for part in range(len(files))] == [5, 5, 2] and not files.missing()
    before = {part: files.file(part).read_bytes() for part in range(3)}
    files.file(1).write_bytes(before[1][:-20])
    files.file(2).unlink()
    assert files.missing() == [1, 2]
    written = files.file(0).stat().st_mtime_ns
    files_of(tmp_path / "files", s, data)
    assert {part: files.file(part).read_bytes() for part in range(3)} == before
    assert files.file(0).stat().st_mtime_ns == written
    column = pq.ParquetFile(files.file(0)).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD" and sorted(f.name for f in files.folder.iterdir()) == [f"part-{p:06}.parquet" for p in range(3)]


def test_files_of_other_rows_and_a_full_disk_are_told(tmp_path: Path) -> None:
    data, s = rows(), spec(source=Offline(k=8))
    files = files_of(tmp_path / "files", s, data)
    with pytest.raises(TrainingError, match="positions of these rows"):
        curve(s, OfflineTeacher(files), data[::-1])
    with pytest.raises(DataError, match=r"need up to 1,000,000,000,000,000,000 bytes .* are free"):
        LogitFiles(tmp_path / "new", 10, 5).check_room(10**9, 10**9)


def test_greedy_answers_are_those_of_transformers() -> None:
    model, prompts = make_llama("teacher"), [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35]]
    ours = sampled_answers(model, prompts, [10, 4, 8], [0, 0, 0], 0.0, {2})
    for prompt, limit, answer in zip(prompts, (10, 4, 8), ours, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=2, pad_token_id=0
        )
        assert answer == whole[0, len(prompt) :].tolist()


def test_what_is_drawn_for_a_row_is_the_same_in_any_company_and_has_the_models_odds() -> None:
    model = make_llama("teacher")
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33]]
    together = sampled_answers(model, prompts, [6, 6, 6], [1, 2, 3], 1.0, {2})
    alone = [sampled_answers(model, [p], [6], [seed], 1.0, {2})[0] for p, seed in zip(prompts, (1, 2, 3), strict=True)]
    assert together == alone and sampled_answers(model, prompts, [6, 6, 6], [4, 5, 6], 1.0, {2}) != together
    num = 400
    drawn = torch.tensor(sampled_answers(model, [[5, 6, 7]] * num, [1] * num, list(range(num)), 2.0, set())).squeeze(1)
    with torch.no_grad():
        probs = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 2.0).softmax(-1)
    token = int(probs.argmax())
    share = float((drawn == token).float().mean())
    assert abs(share - float(probs[token])) < 4 * float((probs[token] * (1 - probs[token]) / num).sqrt())


def on_policy_trainer(method: Full | Lora, mode: str = "none", num_workers: int = 1, **source: Any) -> Trainer:
    s = spec(alpha=0.8, divergence="jsd", source=OnPolicy(every_steps=3, **source))
    adapted, data = adaptation(method), rows()
    student = adapted.attach(make_llama("student"), 0)
    sharded = mode == "fsdp2"
    call = shard(student, worker_mesh("cpu", num_workers, 1)) if sharded else None
    teacher = make_llama("teacher")
    online = OnlineTeacher(teacher, s, VOCABULARY, shard(teacher, worker_mesh("cpu", num_workers, 1)) if sharded else None)
    objective = OnPolicyDistillation(s, s.source, online, student, {2}, seed=0)
    return Trainer(student, adapted, TRAIN, plan_steps(data, TRAIN), data, 0, objective, call)


def test_the_students_own_answers_stand_in_the_rows_and_have_no_hard_labels() -> None:
    trainer = on_policy_trainer(Lora(rank=4), share=0.5)
    losses = [r.loss for r in trainer.run()]
    objective = trainer.objective
    answered = objective.rows.answered
    assert 0 < len(answered) < len(trainer.rows) and len(losses) == TRAIN.max_steps
    for i, row in answered.items():
        original = trainer.rows[i]
        start = original.label_mask.index(True)
        assert row.input_ids[:start] == original.input_ids[:start] and len(row) <= len(original)
        assert not any(row.label_mask[:start]) and all(row.label_mask[start:])
    packs = trainer.plan.steps[-1]
    batch = trainer.batch(packs)
    hard = objective.hard_labels(batch)
    assert len(hard) == batch.num_labels
    assert int(hard.sum()) == sum(trainer.rows[i].num_labels for p in packs for i in p.indices if i not in answered)


def test_a_run_that_goes_on_within_an_interval_learns_from_the_same_answers(tmp_path: Path) -> None:
    whole = [r.loss for r in on_policy_trainer(Full(), temperature=1.0).run()]
    first = on_policy_trainer(Full(), temperature=1.0)
    losses = []
    for result in first.run():
        losses.append(result.loss)
        if result.step == 2:
            break
    write_checkpoint(tmp_path / "c", first.state(), {"step": 2})
    second = on_policy_trainer(Full(), temperature=1.0)
    second.load_state(read_tensors(tmp_path / "c", second.state()), read_progress(tmp_path / "c")["step"])
    losses += [r.loss for r in second.run()]
    assert losses == whole


def work(rank: int, num_workers: int, folder: Path, mode: str) -> None:
    with meeting(folder / "meet", rank, num_workers):
        trainer = on_policy_trainer(Full(), mode, num_workers, share=0.7)
        losses = [r.loss for r in trainer.run()]
        if rank == 0:
            (folder / f"{mode}.json").write_text(json.dumps(losses))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_workers_write_and_learn_what_one_does(mode: str, tmp_path: Path) -> None:
    run_workers(work, 1, 1, tmp_path, "none")
    run_workers(work, 2, 2, tmp_path, mode)
    one, two = (json.loads((tmp_path / f"{m}.json").read_text()) for m in ("none", mode))
    assert two == pytest.approx(one, rel=2e-3) and two[0] == pytest.approx(one[0], rel=1e-5)
