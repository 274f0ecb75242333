"""Answers against expected ones: exact match, field F1 and valid JSON.

An expected answer that is a JSON object is compared as one: the order of keys and whitespace do not count, every value does. Any other
expected answer is compared as text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AnswerScore:
    """One answer. The counts are of (key, value) pairs of the objects, all 0 if the expected answer is text."""

    exact_match: bool
    expects_json: bool
    valid_json: bool
    """The answer is one JSON object and nothing else."""
    num_common: int
    num_answered: int
    num_expected: int


@dataclass(frozen=True)
class AnswerScores:
    num_rows: int
    exact_match: float
    """Share of the rows."""
    field_f1: float | None
    """Micro-averaged over the rows that expect a JSON object: 2 common / (answered + expected) pairs. None without such rows."""
    valid_json: float | None
    """Share of the rows that expect a JSON object. None without such rows."""

    def metrics(self) -> dict[str, float]:
        """Those that are defined, by name."""
        values = {"exact_match": self.exact_match, "field_f1": self.field_f1, "valid_json": self.valid_json}
        return {name: value for name, value in values.items() if value is not None}


def score_answer(answer: str, expected: str) -> AnswerScore:
    expected_object = _json_object(expected)
    if expected_object is None:
        return AnswerScore(
            answer.strip() == expected.strip(), expects_json=False, valid_json=False, num_common=0, num_answered=0, num_expected=0
        )
    answered_object = _json_object(answer)
    answered, wanted = _pairs(answered_object or {}), _pairs(expected_object)
    return AnswerScore(
        exact_match=answered_object is not None and answered == wanted,
        expects_json=True,
        valid_json=answered_object is not None,
        num_common=len(answered & wanted),
        num_answered=len(answered),
        num_expected=len(wanted),
    )


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> AnswerScores:
    """Scores of answers beside the expected ones, row by row. ValueError: not as many of one as of the other, or none."""
    if len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers cannot be compared with {len(expected)} expected ones.")
    if not answers:
        raise ValueError("no answers to score.")
    scores = [score_answer(a, e) for a, e in zip(answers, expected, strict=True)]
    on_json = [s for s in scores if s.expects_json]
    num_pairs = sum(s.num_answered + s.num_expected for s in on_json)
    return AnswerScores(
        num_rows=len(scores),
        exact_match=sum(s.exact_match for s in scores) / len(scores),
        field_f1=2 * sum(s.num_common for s in on_json) / num_pairs if num_pairs else None,
        valid_json=sum(s.valid_json for s in on_json) / len(on_json) if on_json else None,
    )


def _pairs(value: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """Keys with their values as canonical JSON: True, 1 and 1.0 are equal in Python and are not so here."""
    return frozenset((key, json.dumps(inner, sort_keys=True)) for key, inner in value.items())


def _json_object(text: str) -> dict[str, Any] | None:
    """The object that a text is, or None. A key given twice makes it none: which of the values is meant cannot be told."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
