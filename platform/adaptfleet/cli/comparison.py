"""Asks models of an OpenAI-compatible endpoint the same held-out questions, and scores their answers."""

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.evaluation.answers import AnswerScores, score_answers

CONCURRENCY = 16
NUM_SHOTS = 8


@dataclass(frozen=True)
class Contestant:
    label: str
    model: str
    examples: list[Example]
    shots: list[Example]
    max_tokens: int


@dataclass(frozen=True)
class Answered:
    contestant: Contestant
    answers: list[str]

    @property
    def scores(self) -> AnswerScores:
        return score_answers(self.answers, self.expected)

    @property
    def expected(self) -> list[str]:
        return [example.answer or "" for example in self.contestant.examples]


def draw_shots(train: Sequence[Example], seed: int = 0) -> list[Example]:
    """Examples shown to the base before its question, the same for every question."""
    return random.Random(seed).sample(list(train), NUM_SHOTS)


def ask_all(client: OpenAI, contestant: Contestant) -> Answered:
    """Greedy answers to all examples, `CONCURRENCY` at a time, in their order."""
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar, ThreadPoolExecutor(CONCURRENCY) as pool:
        task = bar.add_task(contestant.label, total=len(contestant.examples))

        def ask(example: Example) -> str:
            reply = client.chat.completions.create(
                model=contestant.model, messages=_messages(example, contestant.shots), temperature=0, max_tokens=contestant.max_tokens
            )
            bar.advance(task)
            return reply.choices[0].message.content or ""

        return Answered(contestant, list(pool.map(ask, contestant.examples)))


def _messages(example: Example, shots: Sequence[Example]) -> Any:
    """The question, after the shots as earlier turns of one conversation under the same system message."""
    system = [m for m in example.prompt if m.role == "system"]
    turns: list[Message] = [m for shot in shots for m in shot.messages if m.role != "system"]
    question = [m for m in example.prompt if m.role != "system"]
    return [{"role": m.role, "content": m.content} for m in (*system, *turns, *question)]


def save_answers(file: Path, answered: Sequence[Answered]) -> None:
    """One JSON line an answer: who answered, what was expected, what came."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"contestant": one.contestant.label, "model": one.contestant.model, "expected": expected, "answer": answer})
        for one in answered
        for expected, answer in zip(one.expected, one.answers, strict=True)
    ]
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    unfinished.replace(file)
