"""RRPO's pipeline: what is asked on which media, what becomes a row, what is left out and why, the summary."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row
from trl_vpo.errors import InputError
from trl_vpo.generate.rrpo import RRPOGenerateConfig, RRPOPipeline
from trl_vpo.generate.tasks import read_task
from trl_vpo.media.corruptions import PerturbSettings, perturb
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.requests import AnsweringModel, stream_seed
from trl_vpo.runs.outcome import Outcome
from trl_vpo.testbed import language, world
from trl_vpo.text.responses import Failure

CAPTION = "a red square moves left."
ROWS = {
    "choice": {"question": "Which is true?", "options": ["a red square", "a blue circle", "a cross"], "answer": "A."},
    "yes_no": {"question": "Is the square red?", "answer": "Yes."},
    "short": {"question": "Which colour is it?", "answer": "red."},
    "open": {"question": "Describe the video.", "answer": CAPTION},
}
DIFFERENT = json.dumps(
    {"correct": False, "differences": [{"kind": "attribute", "truth": "red", "answer": "a blue thing"}]}
)
REWRITTEN = '{"rewritten": "a blue square moves left."}'


class Scripted(AnsweringModel):
    """Answers by the first line of the question: one for all attempts, or a list of them. Keeps what it was asked."""

    def __init__(self, **script):
        self.script = {ROWS[kind]["question"]: answer for kind, answer in script.items()}
        self.asked, self.calls = [], []

    def answer(self, requests, sampling):
        self.calls.append(len(requests))
        answers = []
        for request in requests:
            question = request.messages[0]["content"][-1]["text"].split("\n")[0]
            before = sum(self.question(other) == question for other in self.asked)
            self.asked.append(request)
            answer = self.script[question]
            answers.append(answer[before] if isinstance(answer, list) else answer)
        return answers

    @staticmethod
    def question(request):
        return request.messages[0]["content"][-1]["text"].split("\n")[0]

    def record(self):
        return {"model": "scripted", "adapter": None, "revision": None}


class Judge(AnsweringModel):
    """Replies to the two steps. Keeps what it was asked."""

    def __init__(self, differences=DIFFERENT, rewrite=REWRITTEN):
        self.script, self.asked = {"Compare": differences, "Put": rewrite}, []

    def answer(self, requests, sampling):
        assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 1024)
        self.asked += requests
        return [self.script[request.messages[0]["content"][0]["text"].split()[0]] for request in requests]

    def record(self):
        return {"model": "judge", "adapter": None, "revision": None}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    (sample,) = world.draw_samples("clip", 1, 1, habits=False)
    return str(world.write_sample(sample, tmp_path_factory.mktemp("clips") / "a.mp4"))


@pytest.fixture(scope="module")
def media(clip):
    return Media(videos=(load_video(clip, VideoOptions(num_frames=8)),))


@pytest.fixture(scope="module")
def image():
    (sample,) = world.draw_samples("scene", 1, 1, habits=False)
    return Image.fromarray(sample.frames[0])


@pytest.fixture
def row(clip):
    def make(kind, **changes):
        return InputRow(kind, ROWS[kind] | {"source": "test"} | changes, videos=(clip,))

    return make


def pipeline(model=None, judge=None, **config):
    return RRPOPipeline(RRPOGenerateConfig(**config), model, judge, {"pipeline": "rrpo", "settings": "0"})


def run(kind, answer, row, media, judge=None, changes=None, **config):
    """The outcome of one row, after `check` and a trip through JSON as the store makes it."""
    model = Scripted(**{kind: answer})
    model.script |= {(changes or {}).get("question", "").split("\n")[0]: answer}
    made = pipeline(model, judge, **config)
    made.check(row(kind, **(changes or {})))
    (outcome,) = made.make([(row(kind, **(changes or {})), media)])
    assert outcome.id == kind and json.loads(json.dumps(outcome.notes)) == outcome.notes
    for training in outcome.rows:
        read_row(json.loads(json.dumps(training)), phrases=True)
    return outcome, model


def text(messages):
    return messages[0]["content"][-1]["text"]


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_row_made_from_a_wrong_choice(row, media, clip):
    outcome, model = run("choice", "The answer is **B**, of course", row, media)
    (made,) = outcome.rows
    question = "Which is true?\nA. a red square\nB. a blue circle\nC. a cross"
    seed = stream_seed(0, "choice", "perturb 0")
    assert made == {
        "id": "choice",
        "source": "test",
        "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "B."}]}],
        "videos": [clip],
        "chosen_phrases": [[0, 1]],
        "rejected_phrases": [[0, 1]],
        "answer_kind": "choice",
        "model_answer": "The answer is **B**, of course",
        "perturbation": {"mode": "mask+local", "seed": seed},
        "generated_by": {"pipeline": "rrpo", "settings": "0"},
    }
    (asked,) = model.asked
    assert text(asked.messages) == question + "\nAnswer with the letter of the right option."
    again = perturb(media, made["perturbation"]["seed"], PerturbSettings(made["perturbation"]["mode"]))
    assert (asked.media.videos[0].frames == again.videos[0].frames).all()
    assert (asked.media.videos[0].frames != media.videos[0].frames).any()
    assert asked.seed == stream_seed(0, "choice", "answer 0")


@pytest.mark.parametrize(
    "kind, changes, answer, rejected, phrases",
    [
        ("choice", {"answer": "(A) a red square."}, "C", "(C) a cross.", ([[1, 2], [6, 16]], [[1, 2], [6, 11]])),
        ("choice", {"answer": "A red square"}, "a cross", "A cross", ([[2, 12]], [[2, 7]])),
        ("choice", {"answer": "A because it is red"}, "It is C.", "It is C.", ([[0, 12], [16, 19]], [[0, 2], [6, 8]])),
        ("yes_no", {}, "No, it isn't.", "No.", ([[0, 3]], [[0, 2]])),
        ("yes_no", {"answer": "yes"}, "It is not red", "no", ([[0, 3]], [[0, 2]])),
        ("yes_no", {"answer": "NO"}, "yeah", "YES", ([[0, 2]], [[0, 3]])),
        (
            "yes_no",
            {"answer": "No, it is blue."},
            "Yes, it is red.",
            "Yes, it is red.",
            ([[0, 2], [10, 14]], [[0, 3], [11, 14]]),
        ),
        ("short", {}, "It is blue.", "It is blue.", ([[0, 3]], [[0, 10]])),
        ("short", {}, "<think>red? no</think>\nblue.", "blue.", ([[0, 3]], [[0, 4]])),
    ],
)
def test_the_form_of_the_rejected_answer(row, media, kind, changes, answer, rejected, phrases):
    outcome, _ = run(kind, answer, row, media, changes=changes)
    (made,) = outcome.rows
    assert text(made["chosen"]) == changes.get("answer", ROWS[kind]["answer"]) and text(made["rejected"]) == rejected
    assert (made["chosen_phrases"], made["rejected_phrases"]) == phrases
    assert made["model_answer"] == answer and made["answer_kind"] == kind


def test_an_open_answer_is_judged_and_rewritten(row, media):
    judge = Judge()
    outcome, model = run("open", "<think>hm</think>I see a blue thing.", row, media, judge)
    (made,) = outcome.rows
    assert text(made["chosen"]) == CAPTION and text(made["rejected"]) == "a blue square moves left."
    assert (made["chosen_phrases"], made["rejected_phrases"]) == ([[2, 5]], [[2, 6]])
    assert made["model_answer"] == "<think>hm</think>I see a blue thing."
    compare, rewrite = (text(request.messages) for request in judge.asked)
    assert f"Ground truth: {CAPTION}\nAnswer: I see a blue thing.\n" in compare and "hm" not in compare
    assert 'Mistakes:\n- attribute: "a blue thing" instead of "red"\n' in rewrite
    assert all(not request.media.videos for request in judge.asked)
    assert text(model.asked[0].messages) == "Describe the video."  # no suffix
    assert outcome.notes["differences"] == [{"kind": "attribute", "truth": "red", "answer": "a blue thing"}]


def test_open_answers_in_a_fixed_form_need_no_judge(row, media):
    outcome, _ = run("open", "a red circle moves left.", row, media, open_check="exact")
    assert text(outcome.rows[0]["rejected"]) == "a red circle moves left."
    assert outcome.rows[0]["rejected_phrases"] == [[6, 12]]
    outcome, _ = run("open", "A red square moves left", row, media, open_check="exact")
    assert outcome.kind == "answered correctly"


LISTED = "What did she do?\n(A) Washed the clothes.\n(B) Threw the clothes.\n(C) Left."


@pytest.mark.parametrize(
    "truth, rejected",
    [
        ("Answer: (B)", "Answer: (A)"),
        ("Option B", "Option A"),
        ("Best option: (B)", "Best option: (A)"),
        ("B.", "A."),
        ("(b)", "(a)"),
        ("The answer is B", "The answer is A"),
        ("The correct answer is: b)", "The correct answer is: a)"),
        ("B: Threw the clothes", "A: Washed the clothes"),
        ("Answer: B. Threw the clothes.", "Answer: A. Washed the clothes."),
        ("Threw the clothes.", "Washed the clothes."),
    ],
)
def test_every_form_of_a_choice_is_read_as_one(row, media, truth, rejected):
    changes = {"question": LISTED, "answer": truth}
    for right in ("(B) Threw the clothes.", "B", "b.", "She threw the clothes.", "**Answer: B**"):
        outcome, _ = run("short", right, row, media, changes=changes)
        assert outcome.kind == "answered correctly", right
    outcome, _ = run("short", "(A) Washed the clothes.", row, media, changes=changes)
    assert outcome.rows[0]["answer_kind"] == "choice" and text(outcome.rows[0]["rejected"]) == rejected


def test_a_judge_decides_what_may_be_a_synonym(row, media):
    truth = {"question": "What does he ride?", "answer": "A bike."}
    outcome, _ = run("short", "a bicycle", row, media, changes=truth)
    assert outcome.kind == "undecided without a judge"
    assert "'a bicycle' may say 'A bike.' in other words (judge_url" in outcome.reason
    judge = Judge('{"correct": true, "differences": []}')
    outcome, _ = run("short", "a bicycle", row, media, judge, changes=truth)
    assert outcome.rows == () and outcome.notes["tries"] == [["mask+local", "right"]]
    assert "Ground truth: A bike.\nAnswer: a bicycle\n" in text(judge.asked[0].messages)
    judge = Judge('{"correct": false, "differences": [{"kind": "object", "truth": "bike", "answer": "horse"}]}')
    outcome, _ = run("short", "a horse", row, media, judge, changes=truth)
    assert text(outcome.rows[0]["rejected"]) == "a horse" and len(judge.asked) == 1  # it is not rewritten
    outcome, _ = run("short", "unclear", row, media, judge, changes=truth)
    assert outcome.kind == "undecided" and len(judge.asked) == 1


def test_images_are_masked_only(row, image):
    made = pipeline(Scripted(short="blue"))
    (outcome,) = made.make([(InputRow("short", ROWS["short"], images=("a.png",)), Media(images=(image,)))])
    assert outcome.rows[0]["perturbation"]["mode"] == "mask" and outcome.rows[0]["images"] == ["a.png"]
    again = perturb(Media(images=(image,)), outcome.rows[0]["perturbation"]["seed"], PerturbSettings("mask"))
    assert (np.asarray(made.model.asked[0].media.images[0]) == np.asarray(again.images[0])).all()
    assert (np.asarray(again.images[0]) != np.asarray(image)).any()


# --- what is left out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, answer, left_out, reason",
    [
        ("choice", "A", "answered correctly", "attempt 1 (mask+local): 'A' is right."),
        ("choice", "A or B", "undecided", "'A or B' names A and B"),
        ("yes_no", "I cannot tell", "undecided", "'I cannot tell' leaves it open"),
        ("short", "red or blue", "undecided", "alternatives or a denial"),
        ("short", Failure("cut off after 256 tokens"), "no answer", "no answer (cut off after 256 tokens)"),
        ("open", "anything", "open-ended without a judge", "set judge_url and judge_model, or open_check exact"),
    ],
)
def test_what_rules_leave_out(row, media, kind, answer, left_out, reason):
    outcome, model = run(kind, answer, row, media)
    assert outcome.rows == () and outcome.kind == left_out and reason in outcome.reason
    assert len(model.asked) == (kind != "open")


@pytest.mark.parametrize(
    "judge, left_out, reason, asked",
    [
        (Judge('{"correct": true, "differences": []}'), "no key difference", "'a thing' has no key difference", 1),
        (Judge('{"correct": false, "differences": []}'), "no key difference", "has no key difference", 1),
        (Judge("It is wrong."), "judge", "the judge's reply is unusable: there is no JSON object in it", 2),
        (Judge(Failure("refused")), "judge", "the judge's reply is unusable: refused", 2),
        (Judge(rewrite="{'rewritten': 'x'}"), "judge", "the judge's rewrite is unusable: the JSON is not valid", 3),
        (Judge(rewrite=REWRITTEN.replace("blue", "red")), "judge", "says the same as the ground truth", 3),
        (Judge(rewrite='{"rewritten": "Nothing of it is here."}'), "judge", "not aligned", 3),
    ],
)
def test_what_the_judge_leaves_out(row, media, judge, left_out, reason, asked):
    outcome, _ = run("open", "a thing", row, media, judge)
    assert outcome.rows == () and outcome.kind == left_out and reason in outcome.reason
    assert len(judge.asked) == asked and len({request.seed for request in judge.asked}) == asked


@pytest.mark.parametrize("correct, result", [("true", "right"), ("false", "undecided")])
def test_an_answer_without_key_difference_is_right_only_if_the_judge_says_so(correct, result, row, media):
    judge = Judge(f'{{"correct": {correct}, "differences": []}}')
    outcome, _ = run("open", "a thing", row, media, judge)
    assert outcome.notes["tries"] == [["mask+local", result]]


def test_a_clip_that_cannot_be_perturbed_is_not_asked_about(row, media):
    (moving,) = media.videos
    still = Media(videos=(replace(moving, frames=moving.frames[[0] * 8]),))
    outcome, model = run("short", "blue", row, still, perturbation="global")
    assert outcome.kind == "nothing to perturb" and "global shuffling changes nothing" in outcome.reason
    assert model.asked == []


# --- attempts ---------------------------------------------------------------------------------------------------


def test_attempts_go_on_until_an_answer_is_wrong(row, media):
    answers = ["red", Failure("empty"), "maybe", "blue", "green"]
    outcome, model = run("short", answers, row, media, attempts=5)
    assert outcome.rows[0]["model_answer"] == "blue" and len(model.asked) == 4
    assert [result for _, result in outcome.notes["tries"]] == ["right", "failed", "undecided", "wrong"]
    assert outcome.rows[0]["perturbation"]["seed"] == stream_seed(0, "short", "perturb 3")
    assert len({request.seed for request in model.asked}) == 4
    frames = {request.media.videos[0].frames.tobytes() for request in model.asked}
    assert len(frames) == 4


def test_without_a_wrong_answer_every_attempt_is_told(row, media):
    outcome, _ = run("short", ["red", "maybe", "Red."], row, media, attempts=3)
    assert outcome.kind == "undecided"
    assert outcome.reason == (
        "attempt 1 (mask+local): 'red' is right; attempt 2 (mask+local): 'maybe' leaves it open; "
        "attempt 3 (mask+local): 'Red.' is right."
    )


def test_only_rows_without_a_wrong_answer_are_asked_again(row, media):
    model = Scripted(short=["red", "blue"], yes_no="no", choice=["A", "A"])
    made = pipeline(model, attempts=2).make([(row(kind), media) for kind in ("short", "yes_no", "choice")])
    assert [bool(outcome.rows) for outcome in made] == [True, True, False]
    assert model.calls == [3, 2]


def test_neighbours_in_the_batch_change_nothing(row, media):
    script = {"short": ["red", "blue"], "yes_no": "no", "choice": "A", "open": "a blue thing"}
    rows = [(row(kind), media) for kind in script]
    config = {"attempts": 2}
    together = pipeline(Scripted(**script), Judge(), **config).make(rows)
    backwards = pipeline(Scripted(**script), Judge(), **config).make(rows[::-1])[::-1]
    alone = [pipeline(Scripted(**script), Judge(), **config).make([one])[0] for one in rows]
    assert together == backwards == alone
    assert [outcome.id for outcome in together] == list(script)
    other = pipeline(Scripted(**script), Judge(), seed=1, **config).make(rows)
    assert together[0].rows[0]["perturbation"] != other[0].rows[0]["perturbation"]


# --- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example, kind",
    [
        ({"question": "Which?\nA. red\nB. blue", "answer": "B"}, "choice"),
        ({"question": "Which? (A) red (B) blue", "answer": "red"}, "choice"),
        ({"question": "Which? (A) red (B) blue", "answer": "Best option: (B)"}, "choice"),
        ({"question": "Which?", "options": ["red", "blue"], "answer": "blue because it is"}, "choice"),
        ({"question": "Which?\nA. yes\nB. no", "answer": "no"}, "choice"),
        (
            {"question": "Tell a story about A. Red and B. Blue", "answer": "Once, B. Blue met A. Red and they went."},
            "open",
        ),
        ({"question": "Is it red?", "answer": "No, it is blue and very large."}, "yes_no"),
        ({"question": "Is it red?", "options": [], "answer": "yes"}, "yes_no"),
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


def test_what_the_testbed_asks():
    rng = np.random.default_rng(0)
    (sample,) = world.draw_samples("clip", 1, 1, habits=False)
    item = language.choice_item(sample.things, rng)
    task = read_task({"question": item.question, "answer": item.answer}, 4)
    wrong = next(letter for letter in "ABCD" if letter != item.answer[0])
    assert task.kind == "choice" and task.question == item.question
    assert task.check(item.answer).result == "right" and task.check(f"{wrong}.").result == "wrong"
    assert task.rejected(f"{wrong}.", wrong) == f"{wrong}."
    kinds = [
        read_task({"question": i.question, "answer": i.answer}, 4).kind for i in language.open_items(sample.things)
    ]
    assert kinds == ["short"] * 3
    for polar in language.yes_no_pair(sample.things, rng):
        assert read_task({"question": polar.question, "answer": polar.answer}, 4).kind == "yes_no"


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("short", {"question": " "}, "`question` is ' '"),
        ("short", {"answer": None}, "`answer` is None"),
        ("short", {"answer": "\u200b \ufeff"}, "`answer` is '.u200b "),
        ("short", {"answer": 2}, "`answer` is 2"),
        ("short", {"question": "<video>\nWhat?"}, "holds the marker <video>"),
        ("short", {"answer_kind": "caption"}, "`answer_kind` is 'caption'"),
        ("short", {"answer_kind": "choice"}, "there are no options"),
        ("short", {"answer_kind": "yes_no"}, "let it begin with yes or no"),
        ("choice", {"answer": "D"}, "`answer` is 'D': give the letter or the text"),
        ("choice", {"answer": "A or B"}, "`answer` is 'A or B'"),
        ("choice", {"options": ["a dog", "The dog"]}, "say the same"),
    ],
)
def test_rows_that_cannot_be_used(row, kind, changes, message):
    with pytest.raises(InputError, match=message):
        pipeline().check(row(kind, **changes))


def test_rows_without_media_that_can_be_perturbed():
    with pytest.raises(InputError, match="neither a video nor an image"):
        pipeline().check(InputRow("a", ROWS["short"]))
    picture = InputRow("a", ROWS["short"], images=("a.png",))
    pipeline().check(picture)
    with pytest.raises(InputError, match="images cannot be shuffled"):
        pipeline(perturbation="global").check(picture)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"perturbation": "blur"}, "perturbation is 'blur'"),
        ({"mask_area_min": 0.6}, "masked area"),
        ({"attempts": 0}, "attempts is 0"),
        ({"short_words": 0}, "short_words is 0"),
        ({"open_check": "rules"}, "open_check is 'rules'"),
        ({"max_changed": 0.0}, "max_changed is 0.0"),
        ({"judge_temperature": -1.0}, "judge_temperature is -1.0"),
        (
            {"rewrite_prompt": "{question} {truth}"},
            r"rewrite_prompt: .*missing placeholders \['answer', 'differences'\]",
        ),
    ],
)
def test_settings_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=message):
        RRPOGenerateConfig(**config)


# --- preview and summary ----------------------------------------------------------------------------------------


def test_preview_shows_what_would_be_asked(row, media):
    ((title, request),) = pipeline(choice_prompt_suffix="Letter only.").preview(row("choice"), media)
    assert title == "choice question on perturbed media" and text(request.messages).endswith(
        "C. a cross\nLetter only."
    )
    assert (request.media.videos[0].frames == 245).any()
    ((title, _),) = pipeline().preview(row("open"), media)
    assert "needs a judge" in title
    steps = pipeline(judge_url="http://localhost:1/v1", judge_model="m").preview(row("open"), media)
    assert [title for title, _ in steps][1:] == ["the judge: key differences", "the judge: rewrite"]
    assert "Answer: <the model's answer>" in text(steps[1][1].messages)
    assert "<the differences>" in text(steps[2][1].messages)


def test_summary(row, media):
    script = {"short": ["red", "blue"], "yes_no": "no", "choice": "A", "open": "a blue thing"}
    made = pipeline(Scripted(**script), Judge(), attempts=2)
    outcomes = made.make([(row(kind), media) for kind in script])
    outcomes += pipeline(Scripted(short="unclear", yes_no="Yes")).make(
        [(row(k), media) for k in ("short", "yes_no", "open")]
    )
    outcomes.append(Outcome("broken", reason="no such file", kind="unreadable media"))
    assert made.summarize(outcomes) == {
        "rows_by_kind": {"short": 1, "yes_no": 1, "open": 1},
        "rows_by_perturbation": {"mask+local": 3},
        "perturbed_accuracy": {"short": 1.0, "yes_no": 0.5, "choice": 1.0, "open": 0.0},  # of the first attempts
        "perturbed_undecided": {"short": 0.5, "yes_no": 0.0, "choice": 0.0, "open": 0.0},
        # red. / blue.: 1 of 2 and 1 of 1 words; Yes. / No.: 1 of 2 each; the captions: 1 of 6 each
        "words_in_phrases": pytest.approx((((2 / 2) + 1) / 2 + 1 / 2 + 1 / 6) / 3),
        "left_out": {
            "choice": {"answered correctly": 1},
            "short": {"undecided": 1},
            "yes_no": {"answered correctly": 1},
            "open": {"open-ended without a judge": 1},
            "unread": {"unreadable media": 1},
        },
    }
    empty = made.summarize([])
    assert empty["words_in_phrases"] is None and empty["rows_by_kind"] == {}
