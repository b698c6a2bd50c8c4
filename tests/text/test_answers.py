"""Short answers and answers in a fixed form: how people and models write them, and what must not count as wrong."""

import pytest

from trl_vpo.text.answers import RIGHT, UNDECIDED, WRONG, check_exact, check_short
from trl_vpo.text.normalize import normalize, same_words, texts, words


@pytest.mark.parametrize(
    "truth, result, responses",
    [
        ("two", RIGHT, ["2", "Two.", "two", "two dogs", "There are 2.", "about two"]),
        ("two", WRONG, ["three", "12", "a dozen", "22", "zero", "It is 3", "twenty-two", "None"]),
        ("two", UNDECIDED, ["two or three", "not two", "maybe 2", "unclear", "", "?", "more than two", "three?"]),
        ("21", RIGHT, ["twenty-one", "twenty one dogs"]),
        ("1,200", RIGHT, ["1200", "twelve hundred", "one thousand two hundred"]),
        ("2.0", RIGHT, ["2", "two"]),
        ("-5", WRONG, ["5", "- 5"]),
        ("-5", RIGHT, ["-5"]),
        ("50%", RIGHT, ["50 percent"]),
        ("a red square", RIGHT, ["the red square", "Red squares!", "A RED SQUARE", "a red, square"]),
        ("a red square", WRONG, ["a blue square", "It is a white square"]),
        ("a red square", UNDECIDED, ["red circle", "It is a blue circle"]),
        ("a red square", UNDECIDED, ["square", "red", "It's not red", "a blue or a red square"]),
        ("walking", RIGHT, ["walks", "He's walking.", "walked"]),
        ("walking", UNDECIDED, ["running", "strolling"]),
        ("women", RIGHT, ["a woman"]),
        ("left", WRONG, ["right", "to the right"]),
        ("left", UNDECIDED, ["leftover", "up"]),
        ("cannot tell", RIGHT, ["I can't tell", "cannot tell"]),
        ("cannot tell", UNDECIDED, ["not sure"]),
    ],
)
def test_short_answers(truth, result, responses):
    for response in responses:
        assert check_short(response, truth).result == result, response


@pytest.mark.parametrize(
    "truth, response",
    [
        ("bike", "bicycle"), ("couch", "sofa"), ("guy", "a man"), ("tv", "television"), ("kid", "child"),
        ("grey", "gray"), ("aeroplane", "airplane"), ("pink", "purple"), ("3 feet", "36 inches"), ("2:30", "14:30"),
        ("1/2", "0.5"), ("1st", "first"), ("black and white", "white and black"), ("7 pm", "19"), ("B", "(B) red"),
        ("rectangle", "square"), ("Answer: (B)", "(B) Threw the clothes."), ("dark blue", "navy"), ("US", "America"),
    ],
)  # fmt: skip
def test_what_may_say_the_same_is_never_wrong(truth, response):
    for pair in ((response, truth), (truth, response)):
        assert check_short(*pair).result != WRONG


def test_how_long_a_short_answer_may_be():
    assert check_short("a big blue circle", "red", extra_words=2, fixed=True).result == WRONG
    assert check_short("a big blue circle", "red", extra_words=1, fixed=True).result == UNDECIDED
    assert check_short("a big blue circle", "red", extra_words=2).judgeable
    assert not check_short("a big blue circle", "red", extra_words=1).judgeable


def test_answers_in_a_fixed_form():
    truth = "a red square moves left."
    assert check_exact("A red square moves left", truth).result == RIGHT
    for end in ("moves right.", "", "moves left and a cross.", "move left"):
        assert check_exact(f"a red square {end}", truth).result == WRONG
    for open_ in ("", "I cannot tell.", "a red square or maybe a cross."):
        assert check_exact(open_, truth).result == UNDECIDED
    assert same_words("Two dogs, running!", "the 2 dogs running") and not same_words("a dog", "a cat")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It isn't; he can't, I’m sure", "it is not he can not i am sure"),
        ("three million two hundred thousand and one", "3200000 and 1"),
        ("two thousand million", "2000 1000000"),
        ("five thousand six million", "5006 1000000"),
        ("1500 thousand, 1050 hundred", "1500000 1050 100"),
        ("two three", "2 3"),
        ("one hundred five, ninety nine", "105 99"),
        ("3-4 left-hand 12:30 3.50", "3 4 left hand 12:30 3.5"),
        ("1" * 5000, "1" * 5000),  # Python would refuse to make it a number
        ("红色", "红 色"),
    ],
)
def test_words_of_a_text(text, expected):
    assert " ".join(texts(words(normalize(text)))) == expected
