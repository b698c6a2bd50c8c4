"""RRPO's pipeline: what is asked on which media, what becomes a row, what is left out and why, the summary."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scripted_models import ScriptedModel, text_of

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row
from trl_vpo.errors import InputError
from trl_vpo.generate.rrpo import RRPOGenerateConfig, RRPOPipeline
from trl_vpo.media.corruptions import PerturbSettings, perturb
from trl_vpo.media.load import Clip, Media
from trl_vpo.models.requests import stream_seed
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.responses import Failure

CAPTION = "a red square moves left."
ROWS = {
    "choice": {"question": "Which is true?", "options": ["a red square", "a blue circle", "a cross"], "answer": "A."},
    "yes_no": {"question": "Is the square red?", "answer": "Yes."},
    "short": {"question": "Which colour is it?", "answer": "red."},
    "open": {"question": "Describe the video.", "answer": CAPTION},
}
DIFFERENCE = {"kind": "attribute", "truth": "red", "answer": "a blue thing"}
DIFFERENT = json.dumps({"correct": False, "differences": [DIFFERENCE]})
REWRITTEN = '{"rewritten": "a blue square moves left."}'


class Scripted(ScriptedModel):
    """Answers by the first line of the question: one for all attempts, or a list of them."""

    def __init__(self, **script):
        super().__init__(self.answer_by_question)
        self.script = {ROWS[kind]["question"]: answer for kind, answer in script.items()}

    def answer_by_question(self, request):
        question = text_of(request).split("\n")[0]
        answer = self.script[question]
        before = sum(text_of(other).split("\n")[0] == question for other in self.asked)
        return answer[before] if isinstance(answer, list) else answer


class Judge(ScriptedModel):
    """Replies to the two steps."""

    def __init__(self, differences=DIFFERENT, rewrite=REWRITTEN):
        script = {"Compare": differences, "Put": rewrite}
        super().__init__(lambda request: script[text_of(request).split()[0]])

    def answer(self, requests, sampling):
        assert (sampling.temperature, sampling.max_new_tokens) == (0.0, 1024)
        return super().answer(requests, sampling)


PIXELS = np.random.default_rng(0).integers(0, 240, (8, 56, 56, 3), dtype=np.uint8)
MEDIA = Media(videos=(Clip(PIXELS, np.arange(8) / 4, 4.0, 8, 2.0, "a.mp4"),))
IMAGE = Image.fromarray(PIXELS[0])


def row(kind, **changes):
    return InputRow(kind, ROWS[kind] | {"source": "test"} | changes, videos=("/data/a.mp4",))


def pipeline(model=None, judge=None, **config):
    return RRPOPipeline(RRPOGenerateConfig(**config), model, judge, {"pipeline": "rrpo", "settings": "0"})


def run(kind, answer, judge=None, changes=None, media=MEDIA, **config):
    """The outcome of one row, after `check` and a trip through JSON as the store makes it."""
    asked, model = row(kind, **(changes or {})), Scripted(**{kind: answer})
    model.script[asked.example["question"].split("\n")[0]] = answer
    job = pipeline(model, judge, **config)
    job.check(asked)
    (outcome,) = job.make([(asked, media)])
    assert outcome.id == kind and json.loads(json.dumps(outcome.notes)) == outcome.notes
    for training in outcome.rows:
        read_row(json.loads(json.dumps(training)), phrases=True)
    return outcome, model


def reply(row, side):
    return row[side][0]["content"][0]["text"]


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_row_made_from_a_wrong_choice():
    outcome, model = run("choice", "The answer is **B**, of course")
    (training,) = outcome.rows
    question = "Which is true?\nA. a red square\nB. a blue circle\nC. a cross"
    seed = stream_seed(0, "choice", "perturb 0")
    assert training == {
        "id": "choice",
        "source": "test",
        "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "B."}]}],
        "videos": ["/data/a.mp4"],
        "chosen_phrases": [[0, 1]],
        "rejected_phrases": [[0, 1]],
        "answer_kind": "choice",
        "model_answer": "The answer is **B**, of course",
        "perturbation": {"mode": "mask+local", "seed": seed},
        "generated_by": {"pipeline": "rrpo", "settings": "0"},
    }
    (asked,) = model.asked
    assert text_of(asked) == question + "\nAnswer with the letter of the right option."
    again = perturb(MEDIA, training["perturbation"]["seed"], PerturbSettings(training["perturbation"]["mode"]))
    assert (asked.media.videos[0].frames == again.videos[0].frames).all()
    assert (asked.media.videos[0].frames != MEDIA.videos[0].frames).any()
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
        ("yes_no", {"answer": "No, I see blue."}, "Yes, red.", "Yes, red.", ([[0, 2], [4, 14]], [[0, 3], [5, 8]])),
        ("short", {}, "It is blue.", "It is blue.", ([[0, 3]], [[0, 10]])),
        ("short", {}, "<think>red?</think>\nblue.", "blue.", ([[0, 3]], [[0, 4]])),
    ],
)
def test_the_form_of_the_rejected_answer(kind, changes, answer, rejected, phrases):
    outcome, _ = run(kind, answer, changes=changes)
    (training,) = outcome.rows
    assert reply(training, "chosen") == changes.get("answer", ROWS[kind]["answer"])
    assert reply(training, "rejected") == rejected
    assert (training["chosen_phrases"], training["rejected_phrases"]) == phrases
    assert training["model_answer"] == answer and training["answer_kind"] == kind


def test_an_open_answer_is_judged_and_rewritten():
    judge = Judge()
    outcome, model = run("open", "<think>hm</think>I see a blue thing.", judge)
    (training,) = outcome.rows
    assert reply(training, "chosen") == CAPTION and reply(training, "rejected") == "a blue square moves left."
    assert (training["chosen_phrases"], training["rejected_phrases"]) == ([[2, 5]], [[2, 6]])
    assert training["model_answer"] == "<think>hm</think>I see a blue thing."
    compare, rewrite = (text_of(request) for request in judge.asked)
    assert f"Ground truth: {CAPTION}\nAnswer: I see a blue thing.\n" in compare and "hm" not in compare
    assert 'Mistakes:\n- attribute: "a blue thing" instead of "red"\n' in rewrite
    assert text_of(model.asked[0]) == "Describe the video."  # no suffix
    assert outcome.notes["differences"] == [DIFFERENCE]


def test_open_answers_in_a_fixed_form_need_no_judge():
    outcome, _ = run("open", "a red circle.", open_check="exact")
    assert reply(outcome.rows[0], "rejected") == "a red circle."
    outcome, _ = run("open", "A red square moves left", open_check="exact")
    assert outcome.kind == "answered correctly"


def test_a_judge_decides_what_may_be_a_synonym():
    truth = {"question": "What does he ride?", "answer": "A bike."}
    outcome, _ = run("short", "a bicycle", changes=truth)
    assert outcome.kind == "undecided without a judge"
    assert "'a bicycle' may say 'A bike.' in other words (judge_url" in outcome.reason
    judge = Judge('{"correct": true, "differences": []}')
    outcome, _ = run("short", "a bicycle", judge, changes=truth)
    assert outcome.rows == () and outcome.notes["tries"] == [["mask+local", "right"]]
    assert "Ground truth: A bike.\nAnswer: a bicycle\n" in text_of(judge.asked[0])
    judge = Judge('{"correct": false, "differences": [{"kind": "object", "truth": "bike", "answer": "horse"}]}')
    outcome, _ = run("short", "a horse", judge, changes=truth)
    assert reply(outcome.rows[0], "rejected") == "a horse" and len(judge.asked) == 1  # it is not rewritten
    outcome, _ = run("short", "unclear", judge, changes=truth)
    assert outcome.kind == "undecided" and len(judge.asked) == 1


def test_images_are_masked_only():
    job, media = pipeline(Scripted(short="blue")), Media(images=(IMAGE,))
    (outcome,) = job.make([(InputRow("short", ROWS["short"], images=("a.png",)), media)])
    assert outcome.rows[0]["perturbation"]["mode"] == "mask" and outcome.rows[0]["images"] == ["a.png"]
    again = perturb(media, outcome.rows[0]["perturbation"]["seed"], PerturbSettings("mask"))
    assert (np.asarray(job.model.asked[0].media.images[0]) == np.asarray(again.images[0])).all()


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
def test_what_rules_leave_out(kind, answer, left_out, reason):
    outcome, model = run(kind, answer)
    assert outcome.rows == () and outcome.kind == left_out and reason in outcome.reason
    assert len(model.asked) == (kind != "open")


@pytest.mark.parametrize(
    "judge, left_out, reason, asked",
    [
        (Judge("It is wrong."), "judge", "the judge's reply is unusable: there is no JSON object in it", 2),
        (Judge(Failure("refused")), "judge", "the judge's reply is unusable: refused", 2),
        (Judge(rewrite="{'rewritten': 'x'}"), "judge", "the judge's rewrite is unusable: the JSON is not valid", 3),
        (Judge(rewrite=REWRITTEN.replace("blue", "red")), "judge", "says the same as the ground truth", 3),
        (Judge(rewrite='{"rewritten": "Nothing of it is here."}'), "judge", "not aligned", 3),
    ],
)
def test_what_the_judge_leaves_out(judge, left_out, reason, asked):
    outcome, _ = run("open", "a thing", judge)
    assert outcome.rows == () and outcome.kind == left_out and reason in outcome.reason
    assert len(judge.asked) == asked and len({request.seed for request in judge.asked}) == asked


@pytest.mark.parametrize("correct, result", [("true", "right"), ("false", "undecided")])
def test_no_key_difference_is_right_only_if_the_judge_says_so(correct, result):
    judge = Judge(f'{{"correct": {correct}, "differences": []}}')
    outcome, _ = run("open", "a thing", judge)
    assert (outcome.kind, outcome.notes["tries"]) == ("no key difference", [["mask+local", result]])
    assert "'a thing' has no key difference" in outcome.reason and len(judge.asked) == 1


def test_a_clip_that_cannot_be_perturbed_is_not_asked_about():
    (moving,) = MEDIA.videos
    still = Media(videos=(replace(moving, frames=moving.frames[[0] * 8]),))
    outcome, model = run("short", "blue", media=still, perturbation="global")
    assert outcome.kind == "nothing to perturb" and "global shuffling changes nothing" in outcome.reason
    assert model.asked == []


# --- attempts ---------------------------------------------------------------------------------------------------


def test_attempts_go_on_until_an_answer_is_wrong():
    answers = ["red", Failure("empty"), "maybe", "blue", "green"]
    outcome, model = run("short", answers, attempts=5)
    assert outcome.rows[0]["model_answer"] == "blue" and len(model.asked) == 4
    assert [result for _, result in outcome.notes["tries"]] == ["right", "failed", "undecided", "wrong"]
    assert outcome.rows[0]["perturbation"]["seed"] == stream_seed(0, "short", "perturb 3")
    assert len({request.seed for request in model.asked}) == 4
    frames = {request.media.videos[0].frames.tobytes() for request in model.asked}
    assert len(frames) == 4


def test_without_a_wrong_answer_every_attempt_is_reported():
    outcome, _ = run("short", ["red", "maybe", "Red."], attempts=3)
    assert outcome.kind == "undecided"
    assert outcome.reason == (
        "attempt 1 (mask+local): 'red' is right; attempt 2 (mask+local): 'maybe' leaves it open; "
        "attempt 3 (mask+local): 'Red.' is right."
    )


def test_neighbours_in_the_batch_change_nothing():
    script = {"short": ["red", "blue"], "yes_no": "no", "choice": "A", "open": "a blue thing"}
    rows = [(row(kind), MEDIA) for kind in script]
    config = {"attempts": 2}
    model = Scripted(**script)
    together = pipeline(model, Judge(), **config).make(rows)
    assert [len(requests) for requests, _ in model.calls] == [4, 2]  # only those without a wrong answer again
    backwards = pipeline(Scripted(**script), Judge(), **config).make(rows[::-1])[::-1]
    alone = [pipeline(Scripted(**script), Judge(), **config).make([one])[0] for one in rows]
    assert together == backwards == alone
    assert [outcome.id for outcome in together] == list(script)
    other = pipeline(Scripted(**script), Judge(), seed=1, **config).make(rows)
    assert together[0].rows[0]["perturbation"] != other[0].rows[0]["perturbation"]


# --- inputs -----------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used():
    picture = {"images": ("a.png",)}
    pipeline().check(InputRow("a", ROWS["short"], **picture))
    with pytest.raises(InputError, match="neither a video nor an image"):
        pipeline().check(InputRow("a", ROWS["short"]))
    with pytest.raises(InputError, match="images cannot be shuffled"):
        pipeline(perturbation="global").check(InputRow("a", ROWS["short"], **picture))


# --- preview and summary ----------------------------------------------------------------------------------------


def test_preview_shows_what_would_be_asked():
    ((title, request),) = pipeline(choice_prompt_suffix="Letter only.").preview(row("choice"), MEDIA)
    assert title == "choice question on perturbed media"
    assert text_of(request).endswith("C. a cross\nLetter only.")
    assert (request.media.videos[0].frames == 245).any()
    ((title, _),) = pipeline().preview(row("open"), MEDIA)
    assert "needs a judge" in title
    steps = pipeline(judge_url="http://localhost:1/v1", judge_model="m").preview(row("open"), MEDIA)
    assert [title for title, _ in steps][1:] == ["the judge: key differences", "the judge: rewrite"]
    assert "Answer: <the model's answer>" in text_of(steps[1][1])
    assert "<the differences>" in text_of(steps[2][1])


def test_summary():
    script = {"short": ["red", "blue"], "yes_no": "no", "choice": "A", "open": "a blue thing"}
    job = pipeline(Scripted(**script), Judge(), attempts=2)
    outcomes = job.make([(row(kind), MEDIA) for kind in script])
    others = pipeline(Scripted(short="unclear", yes_no="Yes"))
    outcomes += others.make([(row(k), MEDIA) for k in ("short", "yes_no", "open")])
    outcomes.append(Outcome("broken", reason="no such file", kind="unreadable media"))
    assert job.summarize(outcomes) == {
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
    assert job.summarize([])["words_in_phrases"] is None
