"""What responses to yes/no questions say, under both rules, and pairs of questions."""

import numpy as np
import pytest

from trl_vpo.text.yes_no import read_yes_no, score_pairs

# response, the benchmark's reading where yes is right, where no is right, the strict reading
RESPONSES = [
    ("Yes.", "yes", "yes", "yes"),
    ("NO!", "no", "no", "no"),
    ("yes", "yes", "yes", "yes"),
    ("**Yes**", "yes", "yes", "yes"),
    ("Answer: (no)", "no", "no", "no"),
    ("yes yes yes", "yes", "yes", "yes"),
    ("there is no dog", "no", "no", "no"),
    ("yes, there is no dog", "yes", "no", None),
    ("Yes ... no ...", "yes", "no", None),
    ("No, the man says yes.", "yes", "no", None),
    ("Yes/No", "yes", "no", None),
    ("a snowboard", None, None, None),
    ("I know", None, None, None),
    ("Nobody. Not one. Eyes closed.", None, None, None),
    ("None", None, None, None),
    ("not really", None, None, None),
    ("yesterday", None, None, None),
    ("", None, None, None),
    (" \n", None, None, None),
    ("No-one is there", "no", "no", None),  # \b sees a word before the hyphen
    ("_Yes_", None, None, "yes"),  # and none beside an underscore
    ("nope", None, None, None),
]


EXPECTED = ("yes", "no", None)


@pytest.mark.parametrize(("response", "where_yes", "where_no", "strict"), RESPONSES)
def test_parse(response, where_yes, where_no, strict):
    read = {expected: read_yes_no(response, rule="videohallucer", expected=expected).value for expected in EXPECTED}
    assert read == {"yes": where_yes, "no": where_no, None: where_yes if where_yes == where_no else None}
    assert {read_yes_no(response, rule="strict", expected=expected).value for expected in EXPECTED} == {strict}


def test_parse_refuses_what_is_no_text_and_unknown_rules():
    with pytest.raises(TypeError, match="None is no text"):
        read_yes_no(None)
    with pytest.raises(ValueError, match="rule is 'lax'"):
        read_yes_no("yes", rule="lax")


BASIC = ["Yes.", "Yes", "No", "I cannot tell", "Yes, no doubt"]
HALLUCINATED = ["No.", "Yes", "No", "Yes", "There is no dog, yes"]


def test_pairs_under_the_benchmarks_rule():
    answers = score_pairs(BASIC, HALLUCINATED)
    np.testing.assert_array_equal(answers.basic_yes, [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(answers.hallucinated_no, [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(answers.both_right, [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(answers.yes, [1, 2, 0, 1, 1])
    np.testing.assert_array_equal(answers.wrong, [0, 1, 1, 2, 0])
    np.testing.assert_array_equal(answers.unparsed, [0, 0, 0, 1, 0])


def test_pairs_under_the_strict_rule():
    answers = score_pairs(BASIC, HALLUCINATED, "strict")
    np.testing.assert_array_equal(answers.both_right, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(answers.yes, [1, 2, 0, 1, 0])
    np.testing.assert_array_equal(answers.wrong, [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(answers.unparsed, [0, 0, 0, 1, 2])


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="1 basic responses but 2"):
        score_pairs(["yes"], ["no", "no"])
    assert score_pairs([], []).yes.shape == (0,)
