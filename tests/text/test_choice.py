"""Multiple choice by letter and by the options' log-probs."""

import math

import pytest

from trl_vpo.text.choices import by_letter, by_logprob

OPTIONS = ["a red square", "a blue circle", "a green star"]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("B", True),
        ("(b) a blue circle", True),
        ("The answer is B.", True),
        ("A blue circle.", True),
        ("**C**", False),
        ("A red square", False),
        ("B or C", None),
        ("I cannot tell", None),
        ("", None),
    ],
)
def test_the_letter_that_a_response_names(response, right):
    assert by_letter(response, OPTIONS, 1) is right


def test_letters_follow_the_order_of_the_options():
    assert [by_letter("C", OPTIONS, index) for index in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match="answer_index 3 is not one of the 3 options"):
        by_letter("C", OPTIONS, 3)
    with pytest.raises(ValueError, match="27 options"):
        by_letter("C", [str(number) for number in range(27)], 0)


def test_the_highest_log_prob_wins():
    assert by_logprob([-3.0, -1.0, -2.0], 1) == 1
    assert by_logprob([-3.0, -1.0, -2.0], 2) == 0
    assert by_logprob([-3.0, -math.inf], 0) == 1


def test_lengths_take_the_head_start_from_short_options():
    assert by_logprob([-2.0, -4.0], 1) == 0
    assert by_logprob([-2.0, -4.0], 1, lengths=[1, 4]) == 1  # -2 against -1 per token


def test_ties_share_the_point():
    assert by_logprob([-1.0, -1.0, -5.0, -1.0], 3) == pytest.approx(1 / 3)
    assert by_logprob([-1.0, -1.0, -5.0], 2) == 0


@pytest.mark.parametrize(
    ("logps", "answer", "lengths", "match"),
    [
        ([], 0, None, "one number for each option"),
        ([-1.0, math.nan], 0, None, "one number for each option"),
        ([-math.inf, -math.inf], 0, None, "one number for each option"),
        ([-1.0, -2.0], 2, None, "answer_index 2 is not one of the 2 options"),
        ([-1.0, -2.0], -1, None, "answer_index -1"),
        ([-1.0, -2.0], 0, [1], "lengths"),
        ([-1.0, -2.0], 0, [1, 0], "lengths"),
    ],
)
def test_errors(logps, answer, lengths, match):
    with pytest.raises(ValueError, match=match):
        by_logprob(logps, answer, lengths)
