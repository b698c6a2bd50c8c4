"""Kinds of questions, and wrong answers in the form of the ground truth."""

import pytest

from trl_vpo.errors import InputError
from trl_vpo.generate.tasks import read_task


@pytest.mark.parametrize(
    "example, kind",
    [
        ({"question": "Which?\nA. red\nB. blue", "answer": "B"}, "choice"),
        ({"question": "Which? (A) red (B) blue", "answer": "red"}, "choice"),
        ({"question": "Which? (A) red (B) blue", "answer": "Best option: (B)"}, "choice"),
        ({"question": "Which?", "options": ["red", "blue"], "answer": "blue because it is"}, "choice"),
        ({"question": "Tell of A. Red and B. Blue", "answer": "Once, B. Blue met A. Red and they went."}, "open"),
        ({"question": "Is it red?", "answer": "No, it is blue and very large."}, "yes_no"),
        ({"question": "What is written there?", "answer": "No parking"}, "short"),
        ({"question": "What is on the shirt?", "answer": "No. 5"}, "short"),
        ({"question": "What is there?", "answer": "a big red square"}, "short"),
        ({"question": "What is there?", "answer": "a very big red square"}, "open"),
        ({"question": "What is there?", "answer": "a square", "answer_kind": "open"}, "open"),
        ({"question": "What is there?", "answer": "a very big red square", "answer_kind": "short"}, "short"),
        ({"question": "Which?\nA. red\nB. blue", "answer": "B", "answer_kind": "short"}, "short"),
    ],
)
def test_kinds_of_answers(example, kind):
    assert read_task(example, 4).kind == kind


LISTED = "What did she do?\n(A) Washed the clothes.\n(B) Threw the clothes.\n(C) Left."


@pytest.mark.parametrize(
    "truth, rejected",
    [
        ("Answer: (B)", "Answer: (A)"),
        ("Best option: (B)", "Best option: (A)"),
        ("(b)", "(a)"),
        ("The answer is B", "The answer is A"),
        ("The correct answer is: b)", "The correct answer is: a)"),
        ("B: Threw the clothes", "A: Washed the clothes"),
        ("Answer: B. Threw the clothes.", "Answer: A. Washed the clothes."),
        ("Threw the clothes.", "Washed the clothes."),
    ],
)
def test_every_form_of_a_choice_is_read_as_one(truth, rejected):
    task = read_task({"question": LISTED, "answer": truth}, 4)
    for right in ("(B) Threw the clothes.", "B", "b.", "She threw the clothes.", "**Answer: B**"):
        assert task.check(right).result == "right", right
    check = task.check("(A) Washed the clothes.")
    assert (task.kind, check.result) == ("choice", "wrong")
    assert task.rejected("(A) Washed the clothes.", check.parsed) == rejected


QUESTION = {"question": "Which colour is it?", "answer": "red."}
CHOICE = {"question": "Which is true?", "options": ["a red square", "a blue circle"], "answer": "A."}


@pytest.mark.parametrize(
    "example, message",
    [
        (QUESTION | {"question": " "}, "`question` is ' '"),
        (QUESTION | {"answer": None}, "`answer` is None"),
        (QUESTION | {"answer": "\u200b \ufeff"}, "`answer` is '.u200b "),
        (QUESTION | {"answer": 2}, "`answer` is 2"),
        (QUESTION | {"question": "<video>\nWhat?"}, "holds the marker <video>"),
        (QUESTION | {"answer_kind": "caption"}, "`answer_kind` is 'caption'"),
        (QUESTION | {"answer_kind": "choice"}, "there are no options"),
        (QUESTION | {"answer_kind": "yes_no"}, "let it begin with yes or no"),
        (CHOICE | {"answer": "D"}, "`answer` is 'D': give the letter or the text"),
        (CHOICE | {"answer": "A or B"}, "`answer` is 'A or B'"),
    ],
)
def test_rows_that_cannot_be_used(example, message):
    with pytest.raises(InputError, match=message):
        read_task(example, 4)
