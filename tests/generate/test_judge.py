"""The judge of open-ended answers: what it is asked, which replies can be used, and when it is asked again."""

import json

import pytest
from scripted_models import ScriptedModel, text_of

from trl_vpo.errors import JudgeError
from trl_vpo.generate.config import check_template
from trl_vpo.generate.judge import (
    DIFFERENCES_PROMPT,
    REWRITE_PROMPT,
    Difference,
    Judgement,
    Question,
    ask,
    changed_share,
    read_judgement,
    read_rewrite,
)
from trl_vpo.models.requests import Sampling
from trl_vpo.text.responses import Failure

RED_BLUE = Difference("attribute", "red", "blue")
WRONG = Judgement(False, (RED_BLUE,))
REPLY = '{"correct": false, "differences": [{"kind": "attribute", "truth": "red", "answer": "blue"}]}'
TRUTH = "A red square moves slowly to the left of the frame."
SAMPLING = Sampling(100, 0.0)


def replies(*texts):
    """A judge that gives these replies, one after the other."""
    queue = iter(texts)
    return ScriptedModel(lambda request: next(queue))


@pytest.mark.parametrize(
    "reply",
    [
        REPLY,
        f"```json\n{REPLY}\n```",
        f"Here is my comparison {{as asked}}:\n{REPLY}\nI hope this helps {{:",
        f"<think>Perhaps {REPLY.replace('blue', 'green')}</think>\n{REPLY}",
        f"{REPLY}\nAgain:\n{REPLY}",
        REPLY.replace('"attribute"', '" Attribute "').replace('"red"', '"red\n"'),
        '{"result": "see below"} ' + REPLY,
    ],
)
def test_a_judgement_may_stand_among_other_text(reply):
    assert read_judgement(reply) == WRONG


def test_right_answers():
    assert read_judgement('{"correct": true, "differences": []}') == Judgement(True, ())
    assert read_judgement('{"correct": false, "differences": []}') == Judgement(False, ())


@pytest.mark.parametrize(
    "reply, why",
    [
        ("", "no JSON object"),
        ('[{"correct": true}]', '"correct" has to be true or false and "differences" a list'),
        (REPLY.replace("}]}", "},]}"), "not valid"),
        (REPLY[:-2], "not valid"),
        (REPLY.replace("false", '"false"'), '"correct" has to be true or false'),
        (REPLY.replace("correct", "right"), '"correct" has to be true or false'),
        ('{"correct": false, "differences": ["red is blue"]}', "a difference has to have"),
        (REPLY.replace("attribute", "style"), "object, action, attribute"),
        (REPLY.replace('"red"', "5"), "a difference has to have"),
        (REPLY.replace("false", "true"), "calls the answer correct and lists differences"),
        (REPLY + '{"correct": true, "differences": []}', "2 different JSON objects"),
        ("{" * 5000, "not valid"),
        (REPLY.replace("red", "\\ud83d"), "not valid"),
        ('{"a":' * 5000, "not valid"),
    ],
)
def test_replies_that_are_no_judgement(reply, why):
    with pytest.raises(JudgeError, match=why):
        read_judgement(reply)


def rewrite(text):
    return read_rewrite(json.dumps({"rewritten": text}), TRUTH, 0.6)


def test_a_rewrite_that_stays_aligned():
    text = "A blue circle moves slowly to the left of the frame."
    assert rewrite(f" {text} ") == text


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "a text that is not empty"),
        ("  ", "a text that is not empty"),
        (TRUTH, "says the same as the ground truth"),
        ("a red square moves, slowly, to the left of the frame", "says the same as the ground truth"),
        ("Blue things are seen here.", "not aligned with the ground truth: 92% of the words differ, and at most 60%"),
        (TRUTH + " And then" + " it is seen to do it again" * 5, "not aligned"),  # nothing of the truth has changed
    ],
)
def test_a_rewrite_that_cannot_be_used(text, why):
    with pytest.raises(JudgeError, match=why):
        rewrite(text)


def test_the_limit_of_a_rewrite_counts_words():
    truth, reply = "one two three four", '{"rewritten": "one six seven four"}'
    assert read_rewrite(reply, truth, 0.5) == "one six seven four"
    with pytest.raises(JudgeError, match="50% of the words differ, and at most 49% may"):
        read_rewrite(reply, truth, 0.49)
    assert changed_share("a red, red car", [(2, 10)]) == 3 / 5  # `red`, the comma and `red`


def question(number):
    return Question(f"prompt {number} {{}}", (number, number + 100), read_judgement)


def test_what_could_not_be_read_is_asked_once_more():
    judge = replies(REPLY, "garbage", Failure("cut off"), "more {garbage}", REPLY, REPLY, '{"correct": 1}')
    results = ask(judge, [question(n) for n in range(4)], SAMPLING)
    assert results[:3] == [WRONG] * 3
    assert results[3] == Failure('"correct" has to be true or false and "differences" a list')
    (first, sampling), (second, _) = judge.calls
    assert sampling is SAMPLING and [request.seed for request in first] == [0, 1, 2, 3]
    assert [request.seed for request in second] == [101, 102, 103]
    texts = [text_of(request) for request in second]
    assert texts[0].startswith("prompt 1 {}\n\nAn earlier reply could not be used: there is no JSON object in it.")
    assert "could not be used: cut off." in texts[1]
    assert all(request.messages[0]["role"] == "user" and not request.media.videos for request in first + second)


def test_the_prompts_show_the_form_of_the_reply():
    values = {"question": "What is {shown}?", "truth": "a {red} car", "answer": "a bus"}
    text = DIFFERENCES_PROMPT.format(**values)
    assert '{"correct": true or false, "differences": [{"kind": ' in text
    assert "Question: What is {shown}?\nGround truth: a {red} car\nAnswer: a bus\n" in text
    assert "Mistakes:\n- {red}\n" in REWRITE_PROMPT.format(**values, differences="- {red}")


@pytest.mark.parametrize("template", ["{question} {truth}", "{question} {truth} {answer} {other}", "{question", "{}"])
def test_templates_with_other_placeholders_are_refused(template):
    with pytest.raises(ValueError, match=r"differences_prompt.*braces"):
        check_template("differences_prompt", template, {"question", "truth", "answer"})
