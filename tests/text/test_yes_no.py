"""Yes/no answers under the three rules."""

import pytest

from trl_vpo.text.answers import RIGHT, UNDECIDED, WRONG
from trl_vpo.text.yes_no import check_yes_no, read_yes_no, yes_or_no

DOG, LEFT = "Is there a dog in the video?", "Does the square move left?"
# fmt: off
POLAR = {
    (DOG, "yes"): [
        "Yes", "yes.", "YES!", "Yes, it does.", "Yeah", "Yep.", "**Yes**", "Answer: yes", "The answer is yes.",
        "I think yes", "I would say yes.", "Well, yes.", "Based on the video, yes, a dog is there",
        "There is a dog.", "There is a dog in the video.", "There are dogs", "Yes - a dog", "Yes there is",
        "Is there a dog? Yes.", "It is.",
    ],
    (DOG, "no"): [
        "No", "no.", "Nope", "nah", "No, it isn't", "There is no dog", "There isn't a dog.", "There are no dogs",
        "There is not any dog in the video.", "The answer is no", "No there isn't", "No dogs are there",
        "It isn't.", "I believe no.", "No, I see a snowboard.", "There isnt a dog", "<think>yes?</think> No",
    ],
    (DOG, None): [
        "", "not sure", "I cannot tell", "I can't say", "Yes and no", "Yes or no", "Yes. No.", "No, yes", "know",
        "I know snowboards", "not", "notes", "snowboard", "now", "yesterday", "Yes, there is no dog",
        "No, there is a dog", "No, it is.", "Yes, it isn't", "Yes. There is not a dog.", "Maybe", "Yes, maybe",
        "Yes, but I'm not sure", "There is no cat", "There is a cat", "No cars are visible", "No-one is there",
        "No doubt there is a dog", "Yes?", "no doubt", "A cat", "true", "Is there a dog",
        "There is no dog. There is a dog.", "I can't see a dog", "It is no longer there",
        "There is no dog without a dog", "I said yes",
    ],
    (LEFT, "yes"): ["It moves left.", "The square moves left", "It does", "It is moving left"],
    (LEFT, "no"): ["It does not move left.", "The square doesn't move left", "It doesn't.", "No, it moves right."],
    (LEFT, None): [
        "It moves right", "It moves", "left", "Left moves the square", "No, it moves left", "The square is left",
        "Yes. It is not moving.", "The circle moves left", "The square moves left, then right",
    ],
    ("Isn't there a dog?", None): ["There is a dog", "There is no dog"],
    ("Is the street empty?", None): ["No cars are visible."],
    ("Is the square red?", "yes"): ["It is red", "It's red.", "The square is red"],
    ("Is the square red?", "no"): ["It's not red", "It isn't red.", "The square isn't red"],
    ("Is the square red?", None): ["It is a square", "It is blue", "It is not in the video"],
    ("Does the man run before he jumps?", None): ["He jumps", "He does run"],
}
# fmt: on


@pytest.mark.parametrize(
    "question, value, response", [(*key, text) for key, listed in POLAR.items() for text in listed]
)
def test_what_a_yes_or_no_says(question, value, response):
    check = check_yes_no(response, "Yes.", question)
    assert (check.parsed, check.result) == (value, {"yes": RIGHT, "no": WRONG, None: UNDECIDED}[value])
    assert bool(check.why) == (value is None)


@pytest.mark.parametrize(
    "answer, value",
    [
        *[("Yes", "yes"), ("YES", "yes"), ("no.", "no"), ("No, it might be blue.", "no"), ("No it is not", "no")],
        *[(text, None) for text in ("No parking", "No-one", "Nothing", "Yesterday", "Not yet", "No cars are visible")],
    ],
)
def test_ground_truths_that_are_a_yes_or_a_no(answer, value):
    assert yes_or_no(answer) == value


def test_what_cannot_be_checked():
    assert check_yes_no("There is no dog", "yes").result == UNDECIDED  # a statement, and no question
    with pytest.raises(ValueError, match="'maybe' says neither yes nor no"):
        check_yes_no("yes", "maybe")
    with pytest.raises(TypeError, match="None is not text"):
        read_yes_no(None)
    with pytest.raises(ValueError, match="rule is 'lax'"):
        read_yes_no("yes", rule="lax")


# --- the rules of evaluation ------------------------------------------------------------------------------------

# response, the benchmark's reading where yes is right, where no is right, the strict reading
RESPONSES = [
    ("Yes.", "yes", "yes", "yes"),
    ("NO!", "no", "no", "no"),
    ("**Yes**", "yes", "yes", "yes"),
    ("Answer: (no)", "no", "no", "no"),
    ("yes, there is no dog", "yes", "no", None),
    ("Yes ... no ...", "yes", "no", None),
    ("Yes/No", "yes", "no", None),
    ("a snowboard", None, None, None),
    ("Nobody. Not one. Eyes closed.", None, None, None),
    ("None", None, None, None),
    ("", None, None, None),
    ("No-one is there", "no", "no", None),  # \b sees a word before the hyphen
    ("_Yes_", None, None, "yes"),  # and none beside an underscore
    ("nope", None, None, None),
]


@pytest.mark.parametrize(("response", "where_yes", "where_no", "strict"), RESPONSES)
def test_parse(response, where_yes, where_no, strict):
    either = where_yes if where_yes == where_no else None
    for expected, value in (("yes", where_yes), ("no", where_no), (None, either)):
        assert read_yes_no(response, rule="videohallucer", expected=expected).value == value
        assert read_yes_no(response, rule="strict", expected=expected).value == strict
