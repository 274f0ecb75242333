"""ROUGE against values worked out by hand, and its bit-parallel table against the table written out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptfleet.core.evaluation.rouge import common_subsequence_length, rouge_scores, words


@pytest.mark.parametrize(
    ("answer", "expected", "one", "two", "longest"),
    [
        # 6 words each, 5 in common (the twice); of 5 pairs 3 in common: the cat, on the, the mat; longest: the cat on the mat
        ("The cat sat on the mat.", "the cat lay on the mat", 5 / 6, 3 / 5, 5 / 6),
        # Lin 2004, section 3.1: police killed the gunman against police kill the gunman (longest 3) and the gunman kill police (longest 2)
        ("police kill the gunman", "police killed the gunman", 3 / 4, 1 / 3, 3 / 4),
        ("the gunman kill police", "police killed the gunman", 3 / 4, 1 / 3, 2 / 4),
        # a word repeated in the answer counts as often as it is expected: 1 common, 3 + 1 words
        ("no no no", "no", 2 * 1 / 4, 0.0, 2 * 1 / 4),
        # precision 2/2, recall 2/4: F = 2 * 1 * 0.5 / 1.5; bigrams 1 of 1 and 3
        ("one two", "one two three four", 2 / 3, 2 * 1 / 4, 2 / 3),
        ("", "anything", 0.0, 0.0, 0.0),
        ("...", "...", 0.0, 0.0, 0.0),
    ],
)
def test_known_values(answer: str, expected: str, one: float, two: float, longest: float) -> None:
    assert rouge_scores(answer, expected) == pytest.approx({"rouge_1": one, "rouge_2": two, "rouge_l": longest})


def test_words_of_any_script() -> None:
    assert words("Straße_12, Ångström: 東京!") == ["strasse", "12", "ångström", "東京"]


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abcd")))
def test_the_longest_common_subsequence_is_the_tables(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence_length(a, b) == table[-1][-1]
