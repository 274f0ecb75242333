"""On-policy distillation: the student answers, the teacher judges. Generalised knowledge distillation, arXiv 2306.13649."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from adaptfleet.contracts.distillation import Distillation, OnPolicy
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.sampling import sampled_answers
from adaptfleet.core.distill.teachers import Teacher
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.packed_forward import Call, PackedBatch
from adaptfleet.core.steps import StepPlan


class MixedRows(Sequence[Any]):
    """The data's rows, some with an answer of the student's instead of their own."""

    def __init__(self, rows: Sequence[Any], answered: Mapping[int, Encoded]) -> None:
        self.rows = rows
        self.answered = answered

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self.answered[at] if at in self.answered else self.rows[at]


class OnPolicyDistillation(KnowledgeDistillation):
    """Answers of an interval of steps are written before the first of them, each worker its share; all learn from all."""

    def __init__(
        self, spec: Distillation, source: OnPolicy, teacher: Teacher, student: AdaptedModel, end_ids: Collection[int], seed: int
    ) -> None:
        super().__init__(spec, teacher, student)
        self.source = source
        self.end_ids = frozenset(end_ids)
        self.seed = seed
        self.interval = -1
        self.rows = MixedRows([], {})

    def rows_of_step(self, model: AdaptedModel, call: Call, rows: Sequence[Any], plan: StepPlan, step: int) -> MixedRows:
        interval = step // self.source.every_steps
        answered = self.rows.answered
        if interval != self.interval:
            steps = plan.steps[interval * self.source.every_steps : (interval + 1) * self.source.every_steps]
            numbers = {i for packs in steps for pack in packs for i in pack.indices}
            chosen = sorted(i for i in numbers if self._draw(interval, i) < self.source.share)
            answered = dict(
                zip(chosen, self._answers(model, call, [rows[i] for i in chosen], [(interval, i) for i in chosen]), strict=True)
            )
            self.interval = interval
        self.rows = MixedRows(rows, answered)
        return self.rows

    def hard_labels(self, batch: PackedBatch) -> torch.Tensor:
        """[N] 0 where the label is the student's own: it would only learn to say again what it says."""
        if not batch.num_labels:
            return super().hard_labels(batch)
        is_datas = np.asarray([i not in self.rows.answered for i in batch.rows], dtype=np.float32)
        counts = [self.rows[i].num_labels for i in batch.rows]
        return torch.from_numpy(np.repeat(is_datas, counts)).to(batch.input_ids_BT.device)

    def state(self) -> dict[str, torch.Tensor]:
        """The interval's answers: a run that goes on in its middle learns from the same."""
        if self.interval < 0:
            return {}
        answered = self.rows.answered
        lengths = [[i, len(row), row.num_labels] for i, row in answered.items()]
        return {
            "interval": torch.tensor([self.interval]),
            "rows": torch.tensor(lengths, dtype=torch.int64).reshape(-1, 3),
            "ids": torch.tensor([token for row in answered.values() for token in row.input_ids], dtype=torch.int64),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if "interval" not in state:
            return
        self.interval = int(state["interval"])
        answered, ids = {}, state["ids"].tolist()
        for i, length, num_labels in state["rows"].tolist():
            answered[i] = _with_answer(ids[: length - num_labels], ids[length - num_labels : length])
            ids = ids[length:]
        self.rows = MixedRows([], answered)

    def _answers(self, model: AdaptedModel, call: Call, rows: Sequence[Any], names: Sequence[tuple[int, int]]) -> list[Encoded]:
        """The rows with answers of the student's, none longer than the data's own: packs are planned by its lengths.

        Sharded models answer all rows on each worker, for each layer is gathered from all.
        """
        starts = [_answer_start(row) for row in rows]
        prompts = [[int(token) for token in row.input_ids[:start]] for row, start in zip(rows, starts, strict=True)]
        limits = [len(row) - start for row, start in zip(rows, starts, strict=True)]
        seeds = [self._seed(*name) for name in names]
        is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
        rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not is_sharded else (0, 1)
        mine = slice(rank, None, num_workers)

        def answer(model: AdaptedModel, _: Any) -> list[list[int]]:
            return sampled_answers(model, prompts[mine], limits[mine], seeds[mine], self.source.temperature, self.end_ids)

        # answers grow token by token, and compiled layers would be compiled anew for each length
        with torch.compiler.set_stance("force_eager"):
            own: list[list[int]] = call(answer, None)  # type: ignore[arg-type]  # it needs no batch
        written: list[Any] = [own] * num_workers
        if num_workers > 1:
            dist.all_gather_object(written, own)
        answers = [written[k % num_workers][k // num_workers] for k in range(len(rows))]
        return [_with_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _draw(self, interval: int, row: int) -> float:
        """From 0 to 1, for whether the student answers."""
        return self._seed(interval, row, "share") / 2**64

    def _seed(self, interval: int, row: int, what: str = "answer") -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{interval}:{row}:{what}".encode()).digest()[:8], "big")


def _answer_start(row: Any) -> int:
    """Where the last run of labels begins: the last answer of a conversation, the second token of a text."""
    mask = np.asarray(row.label_mask)
    last = int(np.flatnonzero(mask)[-1])
    before = np.flatnonzero(~mask[:last])
    return int(before[-1]) + 1 if len(before) else 1


def _with_answer(prompt: list[int], answer: list[int]) -> Encoded:
    return Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
