"""Held-out questions put to the endpoint with OpenAI's own client, and the answers scored."""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai

from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.evaluation.answers import AnswerScores, score_answers

CONCURRENCY = 16
MAX_ANSWER_TOKENS = 96
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Answer:
    """One line of the saved answers: enough to score it again."""

    series: str
    """Which comparison it belongs to, such as `base_8shot`."""
    model: str
    question: str
    expected: str
    answer: str


def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=_TIMEOUT_S, max_retries=2)


def chat(prompt: Sequence[Message], shots: Sequence[Example] = ()) -> list[dict[str, str]]:
    """The messages of a question, worked examples first as turns of the same chat; the system message, if any, once at the top."""
    system = [message for message in prompt if message.role == "system"]
    turns = [message for shot in shots for message in shot.messages if message.role != "system"]
    asked = [message for message in prompt if message.role != "system"]
    return [{"role": message.role, "content": message.content} for message in (*system, *turns, *asked)]


def ask_all(api: openai.OpenAI, series: str, model: str, questions: Sequence[Example], shots: Sequence[Example] = ()) -> list[Answer]:
    """Greedy answers to all questions, CONCURRENCY at a time, in the questions' order."""

    def ask(question: Example) -> Answer:
        reply = api.chat.completions.create(
            model=model,
            messages=chat(question.prompt, shots),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=MAX_ANSWER_TOKENS,
        )
        return Answer(series, model, question.prompt[-1].content, question.answer or "", reply.choices[0].message.content or "")

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(ask, questions))


def scores(answers: Sequence[Answer]) -> AnswerScores:
    return score_answers([answer.answer for answer in answers], [answer.expected for answer in answers])


def stream_one(api: openai.OpenAI, model: str, question: Example) -> None:
    """Shows an answer as it comes, piece by piece."""
    print(f"\n  > {question.prompt[-1].content}\n  {model}: ", end="")
    stream: Any = api.chat.completions.create(
        model=model,
        messages=chat(question.prompt),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_ANSWER_TOKENS,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            sys.stdout.write(chunk.choices[0].delta.content)
            sys.stdout.flush()
    print("\n")


def wait_until_answers(api: openai.OpenAI, model: str, timeout_s: float) -> float:
    """Asks for one token every 0.1 s until the model answers; returns the time of the first answer, in seconds since the epoch."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            api.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=1)
            return time.time()
        except openai.NotFoundError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def save_answers(answers: Sequence[Answer], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")
    unfinished.replace(file)
