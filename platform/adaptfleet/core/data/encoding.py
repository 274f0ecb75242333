"""Examples as token ids, with the loss on what the assistant answers and on nothing else.

A conversation is rendered by the tokenizer's own chat template (`rendering`) and tokenised as a whole, so that training sees the very ids
that serving sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adaptfleet.contracts.errors import DataError, ModelError
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.data.listing import Listing, rows
from adaptfleet.core.data.rendering import (
    ControlTokenError,
    Rendered,
    Span,
    UnusableError,
    apply_template,
    check_no_control_token,
    control_tokens,
    render,
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and whether each counts in the loss. The first never does: nothing stands before it to predict it from."""

    input_ids: list[int]
    label_mask: list[bool]
    split: int = 0
    """Of a preference: where the rejected answer's own copy of the prompt begins, after the chosen one. 0: one example alone."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return sum(self.label_mask)


@dataclass
class Faults:
    """The rows of one or many blocks that cannot be trained on, by the reason."""

    num_rows: int = 0
    """Rows looked at, the good ones too."""
    untemplated: Listing = field(default_factory=Listing)
    controls: Listing = field(default_factory=Listing)
    unusable: Listing = field(default_factory=Listing)
    melted: Listing = field(default_factory=Listing)
    too_long: Listing = field(default_factory=Listing)
    unlabelled: Listing = field(default_factory=Listing)
    longest: int = 0

    def merge(self, later: "Faults") -> None:
        self.num_rows += later.num_rows
        self.longest = max(self.longest, later.longest)
        for name in ("untemplated", "controls", "unusable", "melted", "too_long", "unlabelled"):
            getattr(self, name).merge(getattr(later, name))

    def error(self, max_tokens: int) -> DataError | None:
        """One error that lists them all, or None where there are none."""
        parts: list[str] = []
        if self.untemplated.count:
            parts.append(
                f"the tokenizer has no chat template, and {rows(self.untemplated.count)} of `messages` (the first: "
                f"{self.untemplated.shown[0]}) need one. "
                f"Use an instruct model, give its folder a chat_template.jinja, or use rows of `prompt` and `completion`."
            )
        if self.controls.count:
            parts.append(self.controls.text(f"{rows(self.controls.count)} cannot be turned into tokens."))
        if self.unusable.count:
            parts.append(self.unusable.text(f"{rows(self.unusable.count)} cannot be turned into tokens."))
        if self.melted.count:
            parts.append(self.melted.text(f"{rows(self.melted.count)} cannot be tokenised as serving would."))
        if self.too_long.count:
            fact = (
                f"{rows(self.too_long.count)} of {self.num_rows} are longer than {max_tokens} tokens. "
                f"Raise train.pack_tokens to {self.longest}, shorten them, or set train.truncate to cut them."
            )
            parts.append(self.too_long.text(fact))
        if self.unlabelled.count:
            parts.append(self.unlabelled.text(f"{rows(self.unlabelled.count)} would have no answer within {max_tokens} tokens."))
        return DataError("\n".join(parts)) if parts else None


@dataclass(frozen=True)
class EncodedBlock:
    rows: list[Encoded]
    """The good rows in order; cut, if they were to be."""
    faults: Faults
    names: list[str]
    """Of every row that could be tokenised."""
    lengths: list[int]
    """Its tokens, before any are cut."""


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
    block = encode_block(examples, tokenizer, max_tokens, truncate)
    error = block.faults.error(max_tokens)
    if error:
        raise error
    return block.rows


def encode_block(examples: Sequence[Example], tokenizer: Any, max_tokens: int, truncate: bool = False) -> EncodedBlock:
    """What `encode_all` does, with the unusable rows as a value: blocks of a large set are encoded apart and reported together."""
    if any(example.rejected is not None for example in examples):
        return _encode_preferences(examples, tokenizer, max_tokens, truncate)
    faults = Faults(num_rows=len(examples))
    _check_tokenizer(examples, tokenizer)
    controls = control_tokens(tokenizer)
    usable: list[Example] = []
    rendered: list[Rendered] = []
    for i, example in enumerate(examples):
        try:
            if example.messages and not example.plain and not tokenizer.chat_template:
                faults.untemplated.add(_name(example, i))
                continue
            check_no_control_token(example, controls)
            rendered.append(render(example, tokenizer))
            usable.append(example if example.origin else replace(example, origin=_name(example, i)))
        except ControlTokenError as reason:
            faults.controls.add(f"{_name(example, i)}: {reason}")
        except UnusableError as reason:
            faults.unusable.add(f"{_name(example, i)}: {reason}")
    encoded = _tokenise(rendered, tokenizer)
    melted = _melted(rendered, encoded, tokenizer, usable)
    faults.melted.extend(melted.values())
    good: list[Encoded] = []
    for i, (example, row) in enumerate(zip(usable, encoded, strict=True)):
        if i not in melted:
            _within(example, row, max_tokens, truncate, good, faults)
    return EncodedBlock(good, faults, [example.origin for example in usable], [len(row) for row in encoded])


def _encode_preferences(examples: Sequence[Example], tokenizer: Any, max_tokens: int, truncate: bool) -> EncodedBlock:
    """Each row as its chosen and its rejected conversation, one after the other; either may have half of the tokens."""
    plain = [replace(example, rejected=None, origin=_name(example, i)) for i, example in enumerate(examples)]
    worse = [
        replace(example, messages=(*example.prompt, Message("assistant", original.rejected)))
        for example, original in zip(plain, examples, strict=True)
        if original.rejected is not None
    ]
    chosen, rejected = (encode_block(side, tokenizer, max_tokens // 2, truncate) for side in (plain, worse))
    faults = chosen.faults
    faults.merge(rejected.faults)
    faults.num_rows = len(examples)
    faults.longest *= 2
    if len(worse) < len(examples):
        mixed = next(example for example in examples if example.rejected is None)
        faults.unusable.add(f"{_name(mixed, 0)}: has no rejected answer, but other rows of the file have one; keep the two apart.")
    if not len(chosen.rows) == len(rejected.rows) == len(examples):
        return EncodedBlock([], faults, chosen.names, [2 * length for length in chosen.lengths])
    pairs = [
        Encoded([*a.input_ids, *b.input_ids], [*a.label_mask, *b.label_mask], split=len(a))
        for a, b in zip(chosen.rows, rejected.rows, strict=True)
    ]
    return EncodedBlock(pairs, faults, chosen.names, [a + b for a, b in zip(chosen.lengths, rejected.lengths, strict=True)])


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
    needs_eos = [e for e in examples if e.text is not None or (e.plain and not tokenizer.chat_template)]
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


def _melted(rendered: Sequence[Rendered], encoded: Sequence[Encoded], tokenizer: Any, examples: Sequence[Example]) -> dict[int, str]:
    """Reasons, by index, for the rows in which the prompt alone, as serving tokenises it, has other ids than before its answer."""
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
        return {}
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
    return dict(sorted(reasons.items()))


def _within(example: Example, row: Encoded, max_tokens: int, truncate: bool, good: list[Encoded], faults: Faults) -> None:
    """Adds the row to the good ones, cut to the limit if it may be, or to the faults."""
    if len(row) > max_tokens and not truncate:
        faults.too_long.add(f"{example.origin}: {len(row)} tokens")
        faults.longest = max(faults.longest, len(row))
        return
    cut = Encoded(row.input_ids[:max_tokens], row.label_mask[:max_tokens]) if len(row) > max_tokens else row
    if any(cut.label_mask):
        good.append(cut)
    else:
        faults.unlabelled.add(f"{example.origin}: {len(row)} tokens")


def _name(example: Example, index: int) -> str:
    return example.origin or f"row {index}"
