import pytest

from adaptfleet.core.evaluation.answers import AnswerScores, score_answer, score_answers


def test_scores_of_a_hand_counted_case() -> None:
    expected = ['{"number":"1","street":"Elm"}', '{"city":"Rome","zip":"00100"}', '{"city":"Oslo"}']
    answers = ['{"street": "Elm", "number": "1"}', '{"city":"Rome","zip":"00101","state":"X"}', "the city is Oslo"]
    # Pairs: common 2 + 1 + 0 = 3, answered 2 + 3 + 0 = 5, expected 2 + 2 + 1 = 5.
    assert score_answers(answers, expected) == AnswerScores(num_rows=3, exact_match=1 / 3, field_f1=2 * 3 / 10, valid_json=2 / 3)


@pytest.mark.parametrize(
    "answer",
    [
        '{"a":true}',
        '{"a":1.0}',
        '{"a":"1"}',
        '{"a":1,"b":2}',
        "{}",
        '[{"a":1}]',
        '{"a":1} and more',
        '{"a":1,"a":1}',
        '{"a":NaN}',
        '"a"',
        "",
    ],
)
def test_an_answer_that_differs_from_the_expected_object_is_no_match(answer: str) -> None:
    assert not score_answer(answer, '{"a":1}').exact_match


def test_order_whitespace_and_nesting_do_not_matter() -> None:
    score = score_answer(' {"b": {"y": 2, "x": [1]}, "a": 1}\n', '{"a":1,"b":{"x":[1],"y":2}}')
    assert score.exact_match
    assert (score.num_common, score.num_answered, score.num_expected) == (2, 2, 2)


def test_text_is_compared_stripped_and_has_no_fields() -> None:
    scores = score_answers([" yes\n", "No"], ["yes", "no"])
    assert scores == AnswerScores(num_rows=2, exact_match=0.5, field_f1=None, valid_json=None)
    assert scores.metrics() == {"exact_match": 0.5}


def test_an_expected_empty_object_is_matched_by_an_empty_object_alone() -> None:
    assert score_answer("{}", "{}").exact_match
    assert not score_answer("nothing", "{}").exact_match


def test_answers_and_expected_ones_are_as_many() -> None:
    with pytest.raises(ValueError, match="1 answers cannot be compared with 2"):
        score_answers(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no answers"):
        score_answers([], [])
