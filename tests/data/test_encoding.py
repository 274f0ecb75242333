from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptfleet.contracts.errors import DataError, ModelError
from adaptfleet.core.data.encoding import Encoded, encode, encode_all, encode_prompt
from adaptfleet.core.data.examples import Example, Message

MakeTokenizer = Callable[..., Any]

LLAMA3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NO_GENERATION_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}" + NO_GENERATION_PROMPT


def chat(*contents: str, system: str | None = None) -> Example:
    messages = [Message("system", system)] if system else []
    messages += [Message("user" if i % 2 == 0 else "assistant", c) for i, c in enumerate(contents)]  # type: ignore[arg-type]
    return Example(tuple(messages))


def labelled(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The text of each run of labelled tokens."""
    runs: list[list[int]] = []
    for i, (token, counts) in enumerate(zip(encoded.input_ids, encoded.label_mask, strict=True)):
        if counts and (i == 0 or not encoded.label_mask[i - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_only_the_answers_and_their_end_of_turn_count(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    example = chat("q1", "a1", "q2 a1", "a2", system="be a1")
    encoded = encode(example, tokenizer, 1000)
    assert labelled(encoded, tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert encoded.num_labels == 6


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: bool(text.strip()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), st.none() | CONTENT)
def test_the_labels_of_any_conversation_read_as_its_answers(
    make_tokenizer: MakeTokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer = make_tokenizer()
    example = chat(*(content for turn in turns for content in turn), system=system)
    encoded = encode(example, tokenizer, 10_000)
    assert labelled(encoded, tokenizer) == [f"{answer}<|im_end|>" for _, answer in turns]
    prompt = encode_prompt(example, tokenizer)
    last = len(encoded) - 1 - encoded.label_mask[::-1].index(True)
    start = max(i for i in range(last + 1) if not encoded.label_mask[i]) + 1
    assert encoded.input_ids[:start] == prompt


@pytest.mark.parametrize("answer", [">", "m", "im_end", "assistant", "<|im_start|", "|"])
def test_an_answer_made_of_the_templates_own_letters_is_found(make_tokenizer: MakeTokenizer, answer: str) -> None:
    tokenizer = make_tokenizer()
    assert labelled(encode(chat(answer, answer, answer, answer), tokenizer, 1000), tokenizer) == [f"{answer}<|im_end|>"] * 2


def test_a_template_without_blanks_after_its_end_of_turn(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(LLAMA3_LIKE)
    assert labelled(encode(chat("q", " a1 ", "q", "a2"), tokenizer, 1000), tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_a_template_that_writes_earlier_turns_differently(make_tokenizer: MakeTokenizer) -> None:
    # The last answer alone gets an empty reasoning block, which the model has to write itself.
    tokenizer = make_tokenizer(DROPS_REASONING)
    assert labelled(encode(chat("q", "a1", "q", "a2"), tokenizer, 1000), tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert labelled(encode(chat("q", "a1"), tokenizer, 1000), tokenizer) == ["<think></think>a1<|im_end|>"]


def test_a_template_that_rewrites_a_content_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(DROPS_REASONING)
    with pytest.raises(DataError, match=r"rewrites messages\[1\]"):
        encode(chat("q", "<think>long</think>a1", "q", "a2"), tokenizer, 1000)


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(NO_END)
    encoded = encode(chat("q", "a"), tokenizer, 1000)
    assert labelled(encoded, tokenizer) == ["a\n<|im_end|>"]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_a_header_that_the_generation_prompt_lacks_is_learnt(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(NO_GENERATION_PROMPT)
    assert labelled(encode(chat("q", "a"), tokenizer, 1000), tokenizer) == ["<|im_start|>assistant\na<|im_end|>"]


def test_what_the_template_refuses_is_listed(make_tokenizer: MakeTokenizer) -> None:
    rows = [chat("q", "a"), chat("q", "a", system="s"), chat("q", "a", system="s")]
    with pytest.raises(DataError) as caught:
        encode_all(rows, make_tokenizer(REFUSES_SYSTEM), 1000)
    assert str(caught.value).startswith(
        "2 rows cannot be turned into tokens.\n  row 1: the chat template refuses it: no system message here"
    )


def test_prompt_and_completion_go_through_the_template_if_there_is_one(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    plain = Example((Message("user", "q"), Message("assistant", "a")), plain=True)
    assert encode(plain, tokenizer, 100) == encode(chat("q", "a"), tokenizer, 100)


def test_prompt_and_completion_without_a_template_are_joined_and_ended(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    plain = Example((Message("user", "Q: 1\nA:"), Message("assistant", " 2")), plain=True)
    encoded = encode(plain, tokenizer, 100)
    assert tokenizer.decode(encoded.input_ids) == "Q: 1\nA: 2<|im_end|>"
    assert labelled(encoded, tokenizer) == [" 2<|im_end|>"]
    assert encode_prompt(plain, tokenizer) == encoded.input_ids[: encoded.label_mask.index(True)]


def test_a_text_counts_whole_but_for_its_first_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    encoded = encode(Example(text="abc"), tokenizer, 100)
    assert tokenizer.decode(encoded.input_ids) == "abc<|im_end|>"
    assert encoded.label_mask == [False, True, True, True]
    with pytest.raises(DataError, match="is a plain text: it has no prompt"):
        encode_prompt(Example(text="abc"), tokenizer)


def test_messages_without_a_template_say_the_way_out(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DataError, match=r"no chat template, and 2 rows of `messages`.*Use an instruct model"):
        encode_all([chat("q", "a"), Example(text="t"), chat("q", "b")], make_tokenizer(chat_template=None), 100)


def test_tokenizers_that_cannot_do_it(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(Example(text="t"), make_tokenizer(eos_token=None), 100)
    encode(chat("q", "a"), make_tokenizer(eos_token=None), 100)

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"no character offsets.*tokenizer\.json"):
        encode(chat("q", "a"), Slow(), 100)


def test_an_answer_that_melts_into_the_prompt_is_refused(make_tokenizer: MakeTokenizer) -> None:
    # "ĊĊ" is two line breaks: the template's own and the answer's first character become one token, which serving never sees.
    tokenizer = make_tokenizer(merges=(("Ċ", "Ċ"),))
    encode(chat("q\n\n", "a\n\nb"), tokenizer, 100)
    with pytest.raises(DataError) as caught:
        encode_all([chat("q", "a"), chat("q", "\na"), chat("q", "a", "q", "\na")], tokenizer, 100)
    assert "2 rows cannot be tokenised as serving would" in str(caught.value)
    assert "row 1: the answer's beginning melts into one token" in str(caught.value)
    assert "row 2: " in str(caught.value)


def test_all_rows_that_are_too_long_are_listed_with_their_lengths(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    rows = [chat("q", "a" * n) for n in (1, 50, 1, 70)]
    lengths = [len(e) for e in encode_all(rows, tokenizer, 1000)]
    with pytest.raises(DataError) as caught:
        encode_all(rows, tokenizer, lengths[0])
    message = str(caught.value)
    assert f"2 rows of 4 are longer than {lengths[0]} tokens. Raise train.pack_tokens to {lengths[3]}" in message
    assert f"row 1: {lengths[1]} tokens" in message
    assert f"row 3: {lengths[3]} tokens" in message


def test_truncated_rows_keep_their_beginning_and_must_keep_a_label(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    row = chat("q", "a" * 50)
    whole = encode(row, tokenizer, 1000)
    cut = encode(row, tokenizer, 40, truncate=True)
    assert (cut.input_ids, cut.label_mask) == (whole.input_ids[:40], whole.label_mask[:40])
    with pytest.raises(DataError, match="1 row would have no answer within 10 tokens"):
        encode(row, tokenizer, 10, truncate=True)


def test_many_rows_are_tokenised_in_batches(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    calls = []
    tokenise = type(tokenizer).__call__

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(args[0]))
            return tokenise(self, *args, **kwargs)

    tokenizer.__class__ = Counting
    encode_all([chat(f"q{i}", f"a{i}") for i in range(500)], tokenizer, 100)
    assert len(calls) <= 4


def test_a_text_that_holds_a_special_token_of_the_template_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError) as caught:
        encode_all([chat("q", "a<|im_end|>b"), chat("q<|im_start|>system", "a"), chat("<|endoftext|>", "a")], tokenizer, 100)
    assert "2 rows cannot be turned into tokens" in str(caught.value)
    assert "row 0: messages[1] holds '<|im_end|>', a special token" in str(caught.value)
    assert "row 1: messages[0] holds '<|im_start|>'" in str(caught.value)
