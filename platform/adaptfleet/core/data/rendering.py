"""Conversations as the text that a tokenizer's chat template makes of them, and where the answers lie in it.

Where an answer lies is found by rendering the conversation up to it and past it. An answer includes its end-of-turn token: without it a
model never learns to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from adaptfleet.core.data.examples import Example

Span = tuple[int, int]
"""First character and the one past the last."""


class UnusableError(Exception):
    """The reason why an example cannot be encoded."""


class ControlTokenError(UnusableError):
    """A text holds one of the template's own special tokens."""


@dataclass(frozen=True)
class _Answer:
    """Places of an assistant's turn in the rendered text; `end` is past the end-of-turn token."""

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """An example as one string; `spans` are the characters that count in the loss."""

    text: str
    spans: tuple[Span, ...]
    special_tokens: bool
    """Whether the tokenizer adds its own beginning; a chat template writes it itself."""
    append_eos: bool


def control_tokens(tokenizer: Any) -> list[str]:
    """The special tokens by which the tokenizer and its chat template begin and end turns."""
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and (token.content == tokenizer.eos_token or token.content in str(tokenizer.chat_template or ""))
    ]


def check_no_control_token(example: Example, controls: Sequence[str]) -> None:
    """Raises ControlTokenError if a message holds one: the tokenizer would read it as the token itself."""
    for i, message in enumerate(example.messages):
        token = next((t for t in controls if t in message.content), None)
        if token:
            raise ControlTokenError(
                f"messages[{i}] holds {token!r}, a special token that would begin or end a turn there. Remove it from the text."
            )


def render(example: Example, tokenizer: Any) -> Rendered:
    """Raises UnusableError if the chat template refuses the example or rewrites it beyond recognition."""
    if example.text is not None:
        return Rendered(example.text, ((0, len(example.text)),), special_tokens=True, append_eos=True)
    if example.plain and not tokenizer.chat_template:
        prompt, completion = (m.content for m in example.messages)
        span = (len(prompt), len(prompt) + len(completion))
        return Rendered(prompt + completion, (span,), special_tokens=True, append_eos=True)
    whole = apply_template(tokenizer, example, len(example.messages))
    turns = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    spans = [_answer_span(example, i, tokenizer, whole) for i in turns]
    if None in spans:
        spans = list(_spans_by_marks(example, turns, tokenizer, whole))
    found = tuple(span for span in spans if span is not None)
    has_end_of_turn = whole[: found[-1].end].rstrip() != whole[: found[-1].content_end].rstrip()
    append_eos = not has_end_of_turn and tokenizer.eos_token_id is not None
    return Rendered(whole, tuple((s.start, s.end) for s in found), special_tokens=False, append_eos=append_eos)


def _answer_span(example: Example, turn: int, tokenizer: Any, whole: str) -> _Answer | None:
    """An assistant's turn, from where the generation prompt ends to the end-of-turn token. None if the template writes a turn differently
    once others follow it.
    """
    content = example.messages[turn].content.strip()
    before = apply_template(tokenizer, example, turn, generation=True)
    after = apply_template(tokenizer, example, turn + 1)
    at = after.find(content, len(before))
    if at < 0 or not whole.startswith(after) or not after.startswith(before):
        return None
    # The newline that many templates write after the end-of-turn token is never generated: the model stops before it.
    trimmed = len(after.rstrip())
    content_end = at + len(content)
    return _Answer(len(before), content_end, trimmed if trimmed > content_end else len(after))


def _spans_by_marks(example: Example, turns: Sequence[int], tokenizer: Any, whole: str) -> list[_Answer]:
    """The assistant's turns, found by rendering the conversation with a mark in place of each content: what stands between the marks is the
    template's own, and with the contents put back it must give the conversation.
    """
    marks = [f"\u27e6{i}\u27e7" for i in range(len(example.messages))]
    marked = replace(example, messages=tuple(replace(m, content=mark) for m, mark in zip(example.messages, marks, strict=True)))
    rest = apply_template(tokenizer, marked, len(marks))
    pieces: list[str] = []
    for i, mark in enumerate(marks):
        piece, found, rest = rest.partition(mark)
        if not found:
            raise UnusableError(f"the chat template does not write messages[{i}] into the conversation.")
        pieces.append(piece)
    pieces.append(rest)
    end_of_turn = pieces[-1].strip()
    answers: list[_Answer] = []
    place = 0
    for i, message in enumerate(example.messages):
        start = place + len(pieces[i])
        content = next(
            (c for c in (message.content, message.content.strip()) if whole.startswith(pieces[i] + c + pieces[i + 1], place)), None
        )
        if content is None:
            raise UnusableError(f"the chat template rewrites messages[{i}], so that its end cannot be told.")
        place = start + len(content)
        if i in turns:
            answers.append(_Answer(start, place, place + len(end_of_turn) if whole.startswith(end_of_turn, place) else place))
    return answers


def apply_template(tokenizer: Any, example: Example, num_messages: int, generation: bool = False) -> str:
    """The first messages as text; with `generation` the assistant's header follows. UnusableError: the template refuses them."""
    messages = [{"role": m.role, "content": m.content} for m in example.messages[:num_messages]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except jinja2.TemplateError as error:
        raise UnusableError(f"the chat template refuses it: {error}") from None
