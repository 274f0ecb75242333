"""ROUGE-1, ROUGE-2 and ROUGE-L as F-measures, Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".

Words are runs of letters and digits, case folded; no stemming, no stop words. An answer or an expected text without an n-gram scores 0.
"""

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def rouge_scores(answer: str, expected: str) -> dict[str, float]:
    """`rouge_1`, `rouge_2` and `rouge_l`, each in [0, 1]."""
    answered, wanted = words(answer), words(expected)
    return {
        "rouge_1": rouge_n(answered, wanted, 1),
        "rouge_2": rouge_n(answered, wanted, 2),
        "rouge_l": rouge_l(answered, wanted),
    }


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def rouge_n(answered: Sequence[str], expected: Sequence[str], n: int) -> float:
    """F-measure of the n-grams in common, each counted as often as it stands in both."""
    grams, wanted = _grams(answered, n), _grams(expected, n)
    return _f_measure((grams & wanted).total(), grams.total(), wanted.total())


def rouge_l(answered: Sequence[str], expected: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, the whole text taken as one sentence."""
    return _f_measure(common_subsequence_length(answered, expected), len(answered), len(expected))


def common_subsequence_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: a row of the table is one integer, Hyyrö 2004 ("Bit-parallel LCS-length computation
    revisited"). A zero in `row` is a place of `a` where the length grows.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _f_measure(num_common: int, num_answered: int, num_expected: int) -> float:
    return 2 * num_common / (num_answered + num_expected) if num_common else 0.0
