"""Multiple choice: which option a response names, options in questions, forms of an answer, log-probs."""

import math

import pytest

from trl_vpo.errors import InputError
from trl_vpo.text.answers import RIGHT, UNDECIDED, WRONG
from trl_vpo.text.choices import (
    by_letter,
    by_logprob,
    check_choice,
    in_form,
    read_choice,
    read_letters,
    read_options,
    with_options,
)

OPTIONS = {"A": "a blue circle", "B": "a red square", "C": "a dark red square", "D": "It cannot be determined."}

# fmt: off
NAMED = {
    "B": [
        "B", "b", "B.", "(B)", "(b)", "b)", "[B]", "**B**", "`B`", '"B"', "'B'", "B:", " B \n", "Ｂ", "答案是B。",
        "Option B", "option b", "Answer: B", "answer: b", "The answer is B", "The answer is: (B)", "Answer: **B**",
        "B. a red square", "(B) a red square.", "B) A red square", "B - a red square", "B\nThe square is red.",
        "The answer is B because A shows a circle.", "The correct answer is (B) a red square.", "I think it's B.",
        "It is probably B", "I'd go with B", "B is correct", "B, since the circle in A is blue",
        "B is right, A is wrong", "a red square", "A red square.", "The Red Square", "red squares",
        "It is a red square that moves left.", "It is not A, it is B.", "Neither A nor C, but B", "B, not C",
        "Not a blue circle but a red square", "a red square rather than a blue circle", "Which one is true? B",
        "A? No, B.", r"\boxed{B}", r"$\boxed{\text{B}}$", "<think>A or C? I am not sure.</think>B",
        "The answer is not A. It is B.",
    ],
    "A": [
        "A", "a", "a.", "(a)", "A.", "A is correct", "option a", "The answer is A.", "A - a blue circle",
        "Blue circles", "The answer is A because it is blue", "choice A, the blue circle",
    ],
    "C": ["C", "a dark red square", "The answer: C)", "I know it is C"],
    "D": ["D", "(D) It cannot be determined.", "It cannot be determined", "It can't be determined from the clip."],
    None: [
        "", "...", "not sure", "I cannot tell", "I can't tell whether it is B", "I'm not sure, B", "Maybe B",
        "perhaps b", "It could be B", "It might be a red square", "either B or C", "I don't know",
        "Sorry, I cannot view videos.", "A or B", "Both A and B", "A, B", "A/B", "A B", "A & B", "A + B", "B, C",
        "A and B are true", "A. B. C. D.", "B? C?", "B?", "it's not B", "It is not a red square",
        "I don't think it's B", "I do not believe that B is true", "neither B nor C", "B is wrong",
        "B is definitely not it", "B can be ruled out", "rule out B", "not A", "B. a blue circle",
        "The answer is B, a dark red square", "Answer: B. Wait, answer: C.", "The answer is B and C", "E", "(E)",
        "2", "Option 2", "All of the above", "None of them", "A man walks", "square", "I", "Because", "Bob",
        "C-section", "snowboard B-roll", "a red circle", "red", "yes",
        # an article is no label
        "The answer is A red object.", "They watch A Trip to the Moon.", "The Video Shows A Man Walking",
        "A (very) small dog", "A <b>small</b> dog", "An A-frame house with a for-loop", "the answer is a man in a car",
        "A few dogs run", "A fits best",
        *[start + "A man walks." for start in ("", "It says:\n", "I see this: ", "It is a dog.\n", "1. ")],
        *[f"It says {opens}A man walks{closes}" for opens, closes in ('""', "“”", "''", "**", "__")],
    ],
}
NAMED["B"] += [start + "A red square" for start in ("The answer is ", "The Answer Is ", "Option ", "It shows ")]
NAMED["B"] += [start + "A Red Square moves" for start in ("It is ", "The video is called ", "Finally, ")]
# fmt: on


@pytest.mark.parametrize("letter, response", [(key, text) for key, listed in NAMED.items() for text in listed])
def test_which_option_a_response_names(letter, response):
    assert read_choice(response, OPTIONS).value == letter
    check = check_choice(response, OPTIONS, "B")
    assert check.parsed == letter
    assert check.result == (UNDECIDED if letter is None else RIGHT if letter == "B" else WRONG)
    assert bool(check.why) == (letter is None)


@pytest.mark.parametrize(
    "form",
    [
        "<answer>{}</answer>", "<answer> {} </answer>", "{{{}}}", '{{"answer": "{}"}}', "{}<|im_end|>", "{}</s>",
        "The correct answer is {} based on the video.", "Option {} (the animal moves)", "{} (the animal moves).",
        "I would choose {} here", "I'd go with {} given the frames", "The answer is {} in this case",
        "{} in this case", "Answer: {} based on the video", "Based on the video, {} fits best", "Option {} fits best.",
        "Option {} The animal moves", "I pick **{}** here", "Of these, **{} is right**", "THE ANSWER IS {} BECAUSE",
    ],
)  # fmt: skip
def test_all_letters_are_read_alike(form):
    options = {"A": "a man walks", "B": "a dog runs", "C": "a cat", "D": "nothing"}
    assert [read_choice(form.format(letter), options).value for letter in options] == list("ABCD")


@pytest.mark.parametrize("answer", ["B", "b.", "(B)", "B. a red square", "A red square", "The answer is B."])
def test_the_ground_truth_of_a_choice_in_any_form(answer):
    assert check_choice("C", OPTIONS, answer).result == WRONG
    assert check_choice("a red square", OPTIONS, answer).result == RIGHT
    with pytest.raises(ValueError, match="'E' names none of the options: give the letter or the text"):
        check_choice("B", OPTIONS, "E")


@pytest.mark.parametrize(
    "options, response, letter",
    [
        ({"A": "yes", "B": "no"}, "No, it isn't.", "B"),
        ({"A": "yes", "B": "no"}, "Yes and no", None),
        ({"A": "two", "B": "three"}, "There are 3 dogs.", "B"),
        ({"A": "1", "B": "12"}, "12", "B"),
        ({"A": "left", "B": "left and right"}, "It moves left and right", "B"),
        ({"A": "cats", "B": "a cat"}, "It is a cat", None),  # no rule tells them apart
        ({"A": "cats", "B": "a cat"}, "A cat.", "B"),
        ({"A": "x > y", "B": "x < y"}, "<think>x > y? No.</think>x < Y", "B"),
        ({"A": "x > y", "B": "x < y"}, "The answer is x < y", None),
        ({"A": "Java", "B": "C++", "C": "C#", "D": "C"}, "C++", "B"),
        ({"A": "Java", "B": "C++", "C": "R", "D": "C"}, "C", "C"),
        ({"A": "left", "B": "right"}, "The right answer is A.", "A"),
        ({"A": "left", "B": "right"}, "The right option", None),
        ({"A": "left", "B": "right"}, "The man on the right", "B"),
        ({"A": "cats", "B": "a cat"}, "B. a cat", "B"),
        ({"A": "plan A", "B": "plan B"}, "plan B", "B"),
        ({letter: f"Team {letter}" for letter in "ABCD"}, "Team A wins.", "A"),
        ({"A": "B", "B": "A"}, "A", "A"),  # texts that are labels themselves are not looked for
        ({"A": "because it rains", "B": "because it is late"}, "because it is late", "B"),
        ({"A": "Not sure", "B": "a dog"}, "Not sure", "A"),
        ({"A": "a dog", "B": "a cat", "C": "none of the above"}, "None of the above.", "C"),
    ],
)
def test_options_that_are_hard_to_tell_apart(options, response, letter):
    assert read_choice(response, options).value == letter


# --- options and forms ------------------------------------------------------------------------------------------

RED_BLUE = {"A": "red", "B": "blue"}


@pytest.mark.parametrize(
    "question, options",
    [
        ("Which colour?\nA. red\nB. blue", RED_BLUE),
        ("Which colour?\n(A) red\n(B) blue\nAnswer with the letter.", RED_BLUE),
        ("Which colour?\na) red\nb) blue", RED_BLUE),
        ("Which colour?\nA.red\n B.blue", RED_BLUE),
        ("Which colour? (A) red, (B) blue", RED_BLUE),
        ("What did A. Smith wear? A. red B. blue", RED_BLUE),
        ("A. red B. blue\nC. green D. black", RED_BLUE | {"C": "green", "D": "black"}),
        (
            "Which is true? A. a cross moves up. B. a cross moves down.",
            {"A": "a cross moves up.", "B": "a cross moves down."},
        ),
        ("Is it A. or C.?", {}),
        ("Sort:\n(a) He sits.\n(b) He runs.\n(c) He eats.\nA. red\nB. blue\nAnswer.", RED_BLUE),
        ("She says:\nA. first\nB. then\nThe end.\nA. red\nB. blue", RED_BLUE),
        ("Which? A. red B. Vitamin A. C. blue", {"A": "red", "B": "Vitamin A.", "C": "blue"}),
        ("Describe the video.\n1. red\n2. blue", {}),
    ],
)
def test_options_in_a_question(question, options):
    assert read_options(question) == options


@pytest.mark.parametrize("given", [["red", "blue"], ["A. red", "B. blue"], ["(A) red", "(B) blue"], [" red ", "blue"]])
def test_options_in_a_column(given):
    options = read_options("Which colour?", given)
    assert options == RED_BLUE
    assert with_options("Which colour?", options) == "Which colour?\nA. red\nB. blue"
    listed = "Which colour? A. Red. B. Blue."
    assert with_options(listed, read_options(listed, given)) == listed


@pytest.mark.parametrize("given", [["(a)(b)", "(b)(a)"], ["A->B", "B->A"], ["a, b", "b, a"], ["Vitamin A", "Vitamin"]])
def test_options_may_be_letters(given):
    """An article says nothing, but these are none; and what is listed with its letter has no second one."""
    options = read_options("Which order?", given)
    assert [*options.values()] == given
    with pytest.raises(InputError, match="make them the same, leave one of them out, or list the options last"):
        read_options("Sort:\n(a) He sits.\n(b) He runs.", given)
    assert read_options(f"Sort:\n(a) He sits.\n(b) He runs.\nA. {given[0]}\nB. {given[1]}", given) == options


@pytest.mark.parametrize(
    "given",
    [
        ["x > y", "x < y"],
        ["≥3", "≤3"],
        ["$5", "€5"],
        ["C++", "C"],
        ["3 - 1", "3, 1"],
        ["1/2", "1, 2"],
        ["😀", "😢"],
        ["x=1", "x=-1"],
    ],
)
def test_options_may_differ_by_a_sign(given):
    options = read_options("Which?", given)
    assert [*options.values()] == given
    assert [read_choice(text, options).value for text in given] == ["A", "B"]
    with pytest.raises(InputError, match="make them the same"):
        read_options(f"Which?\nA. {given[1]}\nB. {given[0]}", given)


@pytest.mark.parametrize(
    ("question", "given"),
    [
        ("Which? A. red / B. blue", ["red", "blue"]),
        ("Which? A. red | B. blue", ["red", "blue"]),
        ("Which?\nA. red…\nB. ‘blue’", ["red...", "'blue'"]),
        ("Which?\nA. 红色。\nB. 蓝色\u200b", ["红色", "蓝色"]),
        ("Which?\nA. cafe\u0301\nB. bar", ["café", "bar"]),
    ],
)
def test_typography_makes_no_other_option(question, given):
    assert list(read_options(question, given)) == ["A", "B"]


def test_names_with_signs_are_no_labels():
    options = dict(zip("ABCD", ["Java", "C++", "C#", "C"]))
    said = ("C++", "It is C++.", "The answer is C++", "**C++**", "Answer: C++", "B. C++")
    assert [read_choice(text, options).value for text in said] == ["B"] * 6
    assert [read_choice(text, options).value for text in ("C", "The answer is C", "C is right")] == ["C"] * 3


@pytest.mark.parametrize(
    "given, message",
    [
        *[(given, "a list of 2 to 26 texts") for given in ("red", ["red", ""], ["red", 2], ["red"])],
        (["red", "Red."], "A and B say the same"),
        (["the cat", "a cat"], "A and B say the same"),
        (["B. red", "A. blue"], "have other letters than A, B and so on"),
        (["A. red", "C. blue"], "have other letters than A, B and so on"),
        (["red", "blue"], "the question lists"),
    ],
)
def test_options_that_cannot_be_used(given, message):
    with pytest.raises(InputError, match=message):
        read_options("Which? A. red B. green" if "blue" in given else "Which?", given)


@pytest.mark.parametrize(
    "answer, form",
    [
        ("B", "C"),
        ("B.", "C."),
        ("**B**", "**C**"),
        ("B. a red square", "C. a dark red square"),
        ("(B) A red square.", "(C) A dark red square."),
        ("A red square.", "A dark red square."),
        ("red square", "a dark red square"),
        ("B because it is red", None),
        ("The answer is B.", "The answer is C."),
    ],
)
def test_a_wrong_answer_in_the_form_of_the_truth(answer, form):
    assert in_form(answer, OPTIONS, "B", "C") == form


def test_an_article_is_no_label():
    assert in_form("A red square.", {"A": "a red square", "B": "a cross."}, "A", "B") == "A cross."
    assert in_form("A. red square", {"A": "a red square", "B": "a cross."}, "A", "B") == "B. a cross"


def test_the_letter_that_a_response_names():
    responses = {"B": True, "A blue circle.": True, "**C**": False, "B or C": None, "": None}
    colours = ["a red square", "a blue circle", "a green star"]
    assert {response: by_letter(response, colours, 1) for response in responses} == responses


def test_the_highest_log_prob_wins_and_ties_share_the_point():
    assert by_logprob([-3.0, -1.0, -2.0], 1) == 1
    assert by_logprob([-3.0, -1.0, -2.0], 2) == 0
    assert by_logprob([-3.0, -math.inf], 0) == 1
    assert by_logprob([-1.0, -1.0, -5.0, -1.0], 3) == pytest.approx(1 / 3)
    assert by_logprob([-1.0, -1.0, -5.0], 2) == 0
    assert by_logprob([-2.0, -4.0], 1) == 0
    assert by_logprob([-2.0, -4.0], 1, lengths=[1, 4]) == 1  # -2 against -1 per token
    for logps in ([], [-1.0, math.nan], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="one number for each option"):
            by_logprob(logps, 0)


@pytest.mark.parametrize(
    "response, letters, named",
    [
        ("A, C, E", "ABCDEF", "ACE"),
        ("(A)(C)(E)(F)", "ABCDEF", "ACEF"),
        ("I think A and I.", "ABCDEFGHI", "AI"),
        ("I'm sure: A", "ABCDEFGHI", "A"),
        ("A, C, E", "ABCD", None),  # no option is E
        ("(A)(C)(E)(F)", "ABCD", None),
        ("I see A and C in the T-shirt of the U.S. team.", "ABCD", "AC"),
        ("CA", "ABC", "AC"),
        ("None of them.", "ABC", None),
    ],
)
def test_several_letters_are_those_of_the_options(response, letters, named):
    assert read_letters(response, letters) == named
