"""Examples as token ids, with the loss on what the assistant answers and on nothing else.

A conversation is rendered by the tokenizer's own chat template (`rendering`) and tokenised as a whole, so that training sees the very ids
that serving sees.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptfleet.contracts.errors import DataError, ModelError
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.rendering import Rendered, Span, UnusableError, apply_template, check_no_control_token, control_tokens, render

MAX_SHOWN = 50
"""Rows shown in one error; the count is of all."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and whether each counts in the loss. The first never does: nothing stands before it to predict it from."""

    input_ids: list[int]
    label_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return sum(self.label_mask)


def encode(example: Example, tokenizer: Any, max_tokens: int, truncate: bool = False) -> Encoded:
    """One example; see `encode_all`."""
    return encode_all([example], tokenizer, max_tokens, truncate)[0]


def encode_all(examples: Sequence[Example], tokenizer: Any, max_tokens: int, truncate: bool = False) -> list[Encoded]:
    """The examples in order, each of at most `max_tokens` tokens; longer ones are cut at the end if `truncate`.

    Conversations go through the chat template, loss on every assistant turn. Prompt and completion do so too if there is a template; if
    not, they are joined as they are and the end-of-sequence token follows. Texts count whole, with the end-of-sequence token.
    DataError lists all rows that are too long, that the template refuses, that hold the template's own special tokens, or whose answers
    melt into the prompt's tokens.
    ModelError: the tokenizer has no offsets or no end-of-sequence token.
    """
    _check_tokenizer(examples, tokenizer)
    controls = control_tokens(tokenizer)
    unusable: list[str] = []
    rendered: list[Rendered] = []
    for i, example in enumerate(examples):
        try:
            check_no_control_token(example, controls)
            rendered.append(render(example, tokenizer))
        except UnusableError as reason:
            unusable.append(f"{_name(example, i)}: {reason}")
    if unusable:
        raise DataError(_listing(f"{_rows(len(unusable))} cannot be turned into tokens.", unusable))
    encoded = _tokenise(rendered, tokenizer)
    unusable = _melted(rendered, encoded, tokenizer, examples)
    if unusable:
        raise DataError(_listing(f"{_rows(len(unusable))} cannot be tokenised as serving would.", unusable))
    return _within(encoded, examples, max_tokens, truncate)


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """The ids that a model continues to give the example's last answer: the same as stand before that answer in training."""
    _check_tokenizer([example], tokenizer)
    if example.text is not None:
        raise DataError(f"{_name(example, 0)} is a plain text: it has no prompt to answer.")
    if example.plain and not tokenizer.chat_template:
        return list(tokenizer(example.messages[0].content)["input_ids"])
    try:
        text = apply_template(tokenizer, example, len(example.messages) - 1, generation=True)
    except UnusableError as reason:
        raise DataError(f"{_name(example, 0)}: {reason}") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_tokenizer(examples: Sequence[Example], tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer gives no character offsets, which place the answers. Use a model folder with a tokenizer.json, "
            "as `tokenizer.save_pretrained` of a fast tokenizer writes it."
        )
    if tokenizer.chat_template:
        needs_eos = [e for e in examples if e.text is not None]
    else:
        chats = [e for e in examples if e.messages and not e.plain]
        if chats:
            raise DataError(
                f"the tokenizer has no chat template, and {_rows(len(chats))} of `messages` (the first: {_name(chats[0], 0)}) need one. "
                f"Use an instruct model, give its folder a chat_template.jinja, or use rows of `prompt` and `completion`."
            )
        needs_eos = list(examples)
    if needs_eos and tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token, so no text can end. Set eos_token in its tokenizer_config.json.")


def _tokenise(rendered: Sequence[Rendered], tokenizer: Any) -> list[Encoded]:
    encoded: list[Encoded | None] = [None] * len(rendered)
    for special in (False, True):
        chosen = [i for i, r in enumerate(rendered) if r.special_tokens is special]
        if not chosen:
            continue
        batch = tokenizer(
            [rendered[i].text for i in chosen],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for i, ids, offsets in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
            ids, mask = list(ids), _label_mask(offsets, rendered[i].spans)
            if rendered[i].append_eos and ids[-1:] != [tokenizer.eos_token_id]:
                ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
            elif rendered[i].append_eos:
                mask[-1] = True
            encoded[i] = Encoded(ids, [False, *mask[1:]])
    return [e for e in encoded if e is not None]


def _label_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token has a character in a span. Tokens and spans both stand in order."""
    mask, k = [], 0
    for start, end in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        mask.append(start < end and k < len(spans) and spans[k][0] < end)
    return mask


def _melted(rendered: Sequence[Rendered], encoded: Sequence[Encoded], tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """Reasons for the rows in which the prompt alone, as serving tokenises it, has other ids than it has before its answer."""
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    for i, (r, e) in enumerate(zip(rendered, encoded, strict=True)):
        # The runs of labels begin where the answers begin.
        starts = [t for t in range(len(e)) if e.label_mask[t] and (t == 0 or not e.label_mask[t - 1])]
        for (start, _), token in zip(r.spans, starts, strict=False):
            if start:
                texts.append(r.text[:start])
                places.append((i, token))
    if not texts:
        return []
    reasons: dict[int, str] = {}
    for special in (False, True):
        chosen = [k for k, (i, _) in enumerate(places) if rendered[i].special_tokens is special]
        prompts = (
            tokenizer([texts[k] for k in chosen], add_special_tokens=special, return_attention_mask=False)["input_ids"] if chosen else []
        )
        for k, ids in zip(chosen, prompts, strict=True):
            i, token = places[k]
            if list(ids) != encoded[i].input_ids[:token]:
                reasons.setdefault(
                    i,
                    f"{_name(examples[i], i)}: the answer's beginning melts into one token with the end of the prompt. "
                    f"Let the answer begin without whitespace, and a prompt without a chat template end in a line break.",
                )
    return [reasons[i] for i in sorted(reasons)]


def _within(encoded: list[Encoded], examples: Sequence[Example], max_tokens: int, truncate: bool) -> list[Encoded]:
    too_long = [i for i, e in enumerate(encoded) if len(e) > max_tokens]
    if too_long and not truncate:
        lines = [f"{_name(examples[i], i)}: {len(encoded[i])} tokens" for i in too_long]
        longest = max(len(encoded[i]) for i in too_long)
        raise DataError(
            _listing(
                f"{_rows(len(too_long))} of {len(encoded)} are longer than {max_tokens} tokens. "
                f"Raise train.pack_tokens to {longest}, shorten them, or set train.truncate to cut them.",
                lines,
            )
        )
    cut = [Encoded(e.input_ids[:max_tokens], e.label_mask[:max_tokens]) if len(e) > max_tokens else e for e in encoded]
    unlabelled = [f"{_name(examples[i], i)}: {len(encoded[i])} tokens" for i, e in enumerate(cut) if not any(e.label_mask)]
    if unlabelled:
        raise DataError(_listing(f"{_rows(len(unlabelled))} would have no answer within {max_tokens} tokens.", unlabelled))
    return cut


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _name(example: Example, index: int) -> str:
    return example.origin or f"row {index}"


def _listing(fact: str, lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in itertools.islice(lines, MAX_SHOWN)]
    rest = [f"  ... and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    return "\n".join([fact, *shown, *rest])
