"""The rules that read answers: how people and models really write them, and what must not be taken for wrong."""

import pytest

from trl_vpo.errors import InputError
from trl_vpo.text.answers import RIGHT, UNDECIDED, WRONG, check_exact, check_short
from trl_vpo.text.choices import check_choice, in_form, read_choice, read_options, with_options
from trl_vpo.text.normalize import normalize, same_words, texts, words
from trl_vpo.text.yes_no import check_yes_no, yes_or_no

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
    "C": [
        "C", "a dark red square", "The answer: C)", "I know it is C",
    ],
    "D": [
        "D", "(D) It cannot be determined.", "It cannot be determined", "It can't be determined from the clip.",
    ],
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
    ],
}
# fmt: on


@pytest.mark.parametrize("letter, response", [(key, text) for key, listed in NAMED.items() for text in listed])
def test_which_option_a_response_names(letter, response):
    assert read_choice(response, OPTIONS).value == letter
    verdict = check_choice(response, OPTIONS, "B")
    assert verdict.parsed == letter
    assert verdict.result == (UNDECIDED if letter is None else RIGHT if letter == "B" else WRONG)
    assert bool(verdict.why) == (letter is None)


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


def test_options_that_are_labels_with_a_name():
    teams = {letter: f"Team {letter}" for letter in "ABCD"}
    assert [read_choice(f"Team {letter} wins.", teams).value for letter in teams] == list("ABCD")


@pytest.mark.parametrize(
    "response, letter",
    [
        *[(start + "A red square", "B") for start in ("The answer is ", "The Answer Is ", "Option ", "It shows ")],
        *[(start + "A Red Square moves", "B") for start in ("It is ", "The video is called ", "Finally, ")],
        ("The answer is A red object.", None),  # as option B begins
        *[(start + "A man walks.", None) for start in ("", "It says:\n", "I see this: ", "It is a dog.\n", "1. ")],
        ("A cat,\nA man walking,\nA child", None),
        *[(f"It says {opens}A man walks{closes}", None) for opens, closes in ('""', "“”", "''", "**", "__")],
        ("They watch A Trip to the Moon.", None),
        ("The Video Shows A Man Walking", None),
        ("THE MAN SEES A DOG", None),
        ("A fits best", None),
        ("A few dogs run", None),
        ("A (very) small dog", None),
        ("A <b>small</b> dog", None),
        ("An A-frame house with a for-loop", None),
        ("A in-depth look", None),
        ("I see a man, a dog and a cat", None),
        ("the answer is a man in a car", None),
    ],
)
def test_an_article_in_a_sentence_is_no_label(response, letter):
    assert read_choice(response, OPTIONS).value == letter


@pytest.mark.parametrize("answer", ["B", "b.", "(B)", "B. a red square", "A red square", "The answer is B."])
def test_the_ground_truth_of_a_choice_in_any_form(answer):
    assert check_choice("C", OPTIONS, answer).result == WRONG
    assert check_choice("a red square", OPTIONS, answer).result == RIGHT


def test_a_ground_truth_that_names_no_option_is_an_error():
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
        ({"A": "cats", "B": "a cat"}, "a cat", None),  # no rule tells them apart
        ({"A": "cats", "B": "a cat"}, "B. a cat", "B"),
        ({"A": "plan A", "B": "plan B"}, "plan B", "B"),
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
        ("Which colour?\nA: red\nB: blue", RED_BLUE),
        ("Which colour?\nA.red\n B.blue", RED_BLUE),
        ("Which colour? A. red B. blue", RED_BLUE),
        ("Which colour? (A) red, (B) blue", RED_BLUE),
        ("What did A. Smith wear? A. red B. blue", RED_BLUE),
        ("A. red B. blue\nC. green D. black", RED_BLUE | {"C": "green", "D": "black"}),
        (
            "Which is true? A. a cross moves up. B. a cross moves down.",
            {"A": "a cross moves up.", "B": "a cross moves down."},
        ),
        ("Is it A. or C.?", {}),
        ("What colour is it?", {}),
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


@pytest.mark.parametrize(
    "question, given, message",
    [
        ("Which?", "red", "a list of texts"),
        ("Which?", ["red", ""], "a list of texts"),
        ("Which?", ["red", 2], "a list of texts"),
        ("Which?", ["red"], "has 1 entries"),
        ("Which?", ["red", "Red."], "A and B say the same"),
        ("Which? A. red B. green", ["red", "blue"], "the question lists"),
    ],
)
def test_options_that_cannot_be_used(question, given, message):
    with pytest.raises(InputError, match=message):
        read_options(question, given)


@pytest.mark.parametrize(
    "answer, form",
    [
        ("B", "C"),
        ("b", "c"),
        ("B.", "C."),
        ("(B)", "(C)"),
        ("**B**", "**C**"),
        ("B. a red square", "C. a dark red square"),
        ("(B) A red square.", "(C) A dark red square."),
        ("a red square", "a dark red square"),
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


# --- yes or no --------------------------------------------------------------------------------------------------

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
    (LEFT, "yes"): [
        "It moves left.", "The square moves left", "It does", "It is moving left",
    ],
    (LEFT, "no"): [
        "It does not move left.", "The square doesn't move left", "It doesn't.", "No, it moves right.",
    ],
    (LEFT, None): [
        "It moves right", "It moves", "left", "Left moves the square", "No, it moves left", "The square is left",
        "Yes. It is not moving.", "The circle moves left", "The square moves left, then right",
    ],
    ("Isn't there a dog?", None): [
        "There is a dog", "There is no dog",
    ],
    ("Is the street empty?", None): [
        "No cars are visible.",
    ],
    ("Is the square red?", "yes"): [
        "It is red", "It's red.", "The square is red",
    ],
    ("Is the square red?", "no"): [
        "It's not red", "It isn't red.", "The square isn't red",
    ],
    ("Is the square red?", None): [
        "It is a square", "It is blue", "It is not in the video",
    ],
    ("Does the man run before he jumps?", None): [
        "He jumps", "He does run",
    ],
}
# fmt: on


@pytest.mark.parametrize(
    "question, said, response", [(*key, text) for key, listed in POLAR.items() for text in listed]
)
def test_what_a_yes_or_no_says(question, said, response):
    verdict = check_yes_no(response, "Yes.", question)
    assert (verdict.parsed, verdict.result) == (said, {"yes": RIGHT, "no": WRONG, None: UNDECIDED}[said])
    assert bool(verdict.why) == (said is None)


def test_without_the_question_a_statement_says_nothing():
    assert check_yes_no("There is no dog", "yes").result == UNDECIDED


@pytest.mark.parametrize(
    "answer, said",
    [
        *[("Yes", "yes"), ("YES", "yes"), ("no.", "no"), ("No, it might be blue.", "no"), ("No it is not", "no")],
        *[(text, None) for text in ("No parking", "No-one", "Nothing", "Yesterday", "Not yet", "No cars are visible")],
    ],
)
def test_ground_truths_that_are_a_yes_or_a_no(answer, said):
    assert yes_or_no(answer) == said


def test_a_ground_truth_without_yes_or_no_is_an_error():
    with pytest.raises(ValueError, match="'maybe' says neither yes nor no"):
        check_yes_no("yes", "maybe")


# --- short answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truth, result, responses",
    [
        ("two", RIGHT, ["2", "Two.", "two", "two dogs", "There are 2.", "about two"]),
        ("two", WRONG, ["three", "12", "a dozen", "22", "zero", "It is 3", "twenty-two", "None"]),
        (
            "two",
            UNDECIDED,
            ["two or three", "not two", "maybe 2", "unclear", "", "?", "either", "more than two", "three?"],
        ),
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
        ("a red square", UNDECIDED, ["A big blue circle moves across the whole frame"]),  # seven words, not six
        ("a red square", UNDECIDED, ["A big blue circle moves across"]),
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
    assert {response: check_short(response, truth).result for response in responses} == dict.fromkeys(
        responses, result
    )


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
    for wrong in (
        "a red square moves right.",
        "a red square.",
        "a red square moves left and a cross.",
        "red squares move left",
    ):
        assert check_exact(wrong, truth).result == WRONG
    for open_ in ("", "I cannot tell.", "a red square or maybe a cross."):
        assert check_exact(open_, truth).result == UNDECIDED
    assert same_words("Two dogs, running!", "the 2 dogs running") and not same_words("a dog", "a cat")


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It isn't; he can't, I’m sure", "it is not he can not i am sure"),
        ("three million two hundred thousand and one", "3200000 and 1"),
        ("two three", "2 3"),
        ("one hundred five, ninety nine", "105 99"),
        ("3-4 left-hand 12:30 3.50", "3 4 left hand 12:30 3.5"),
        ("1" * 5000, "1" * 5000),  # Python would refuse to make it a number
        ("红色", "红 色"),
    ],
)
def test_words_of_a_text(text, expected):
    assert " ".join(texts(words(normalize(text)))) == expected
