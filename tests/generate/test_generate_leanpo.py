"""LeanPO's pipeline: what is asked, what becomes a row, what is dropped and why, and what the summary says."""

import hashlib
import json
import math

import numpy as np
import pytest
from PIL import Image

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row
from trl_vpo.errors import GenerateError, InputError
from trl_vpo.generate.leanpo import HINT_PROMPT, LeanPOGenerateConfig, LeanPOPipeline, keep_top
from trl_vpo.media.load import Clip, Media, VideoOptions, load_video
from trl_vpo.models.requests import AnsweringModel, stream_seed
from trl_vpo.runs.outcome import Outcome
from trl_vpo.testbed import language, world
from trl_vpo.text.responses import Failure

PROMPTS = {"hint_prompt": language.HINT, "reflection_prompt": language.REFLECTION}
TRUTH = "a red square moves left."


class Scripted(AnsweringModel):
    """Answers by stage: {stage: {row id: answer}}, or one answer for all rows. Keeps what it was asked."""

    can_score = True

    def __init__(self, script=None, rewards=None):
        first = {"hint": "first.", "reflection": TRUTH, "damaged": "a blue square moves up.", "plain": TRUTH}
        self.script = first | (script or {})
        self.rewards = rewards or {}
        self.asked = []  # (stage, request, sampling)
        self.scored = []  # (request, response)

    def answer(self, requests, sampling):
        answers = []
        for request in requests:
            stage = self.stage(request)
            self.asked.append((stage, request, sampling))
            answer = self.script[stage]
            answers.append(answer[self.row_id(request)] if isinstance(answer, dict) else answer)
        return answers

    def average_logps(self, requests, responses):
        self.scored += zip(requests, responses)
        return [self.rewards.get(response, -1.0) for response in responses]

    def record(self):
        return {"model": "scripted", "adapter": None, "revision": None}

    @staticmethod
    def stage(request):
        text = request.messages[0]["content"][-1]["text"]
        if text.startswith("You said:"):
            return "reflection"
        if text.startswith("Hint:"):
            return "hint"
        return "damaged" if len(request.media.videos[0].frames) == 2 else "plain"

    @staticmethod
    def row_id(request):
        return request.media.videos[0].source


class Server(Scripted):
    can_score = False


class Hashed(Scripted):
    """Answers and rewards that depend on everything in a request: its text, pixels, seed and sampling."""

    def answer(self, requests, sampling):
        return [self._words(request, sampling) for request in requests]

    def average_logps(self, requests, responses):
        return [-self._rng(request, response).random() for request, response in zip(requests, responses)]

    def _words(self, request, sampling):
        rng = self._rng(request, sampling)
        if rng.random() < 0.1:
            return Failure("the model said nothing")
        return " ".join(str(word) for word in rng.choice(["a", "red", "square", "moves", "left"], 5))

    @staticmethod
    def _rng(request, more):
        pixels = [video.frames.tobytes() for video in request.media.videos]
        content = repr((request.messages, request.seed, more)).encode() + b"".join(pixels)
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))


def item(id="r0", question="What moves?", answer=TRUTH, frames=16):
    """One input with its decoded clip of noise, which is named after it."""
    pixels = np.random.default_rng(int(id[1:])).integers(0, 256, (frames, 28, 28, 3), dtype=np.uint8)
    clip = Clip(pixels, np.arange(frames) / 4, 4.0, frames, frames / 4, id)
    row = InputRow(id, {"question": question, "answer": answer, "source": "s"}, videos=(f"/data/{id}.mp4",))
    return row, Media(videos=(clip,))


def pipeline(model, **settings):
    return LeanPOPipeline(LeanPOGenerateConfig(**PROMPTS | settings), model, None, {"pipeline": "leanpo"})


def text_of(request):
    return request.messages[0]["content"][-1]["text"]


def test_what_is_asked_and_the_row_that_comes_of_it():
    model = Scripted(rewards={TRUTH: -0.25, "a blue square moves up.": -2.0})
    row, media = item()
    (outcome,) = pipeline(model, seed=7).make([(row, media)])
    assert [(stage, text_of(request)) for stage, request, _ in model.asked] == [
        ("hint", f"Hint: {TRUTH} What moves?"),
        ("reflection", f"You said: first. Hint: {TRUTH} What moves?"),
        ("damaged", "What moves?"),
        ("plain", "What moves?"),
    ]
    for stage, request, sampling in model.asked:
        assert request.messages[0]["content"][0] == {"type": "video"} and len(request.messages) == 1
        assert request.seed == stream_seed(7, "r0", stage)
        assert (sampling.temperature, sampling.top_p) == (0.0 if stage == "plain" else 1.0, 0.9)
        if stage != "damaged":
            assert request.media is media
    assert [(text_of(request), response) for request, response in model.scored] == [
        ("What moves?", TRUTH),
        ("What moves?", "a blue square moves up."),
        ("What moves?", TRUTH),
    ]
    assert all(request.media is media for request, _ in model.scored)
    assert outcome.rows == (
        {
            "id": "r0",
            "source": "s",
            "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": TRUTH}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a blue square moves up."}]}],
            "videos": ["/data/r0.mp4"],
            "chosen_trust": 1.0,
            "rejected_trust": 0.6,
            "chosen_reward": -0.25,
            "rejected_reward": -2.0,
            "answer_reward": -0.25,
            "generated_by": {"pipeline": "leanpo"},
        },
    )
    assert outcome.notes["answers"]["hint"] == "first." and outcome.notes["plain_right"] is True
    json.dumps(outcome.notes)
    read_row(outcome.rows[0])


def test_without_reflection_the_first_answer_wins():
    model = Scripted()
    (outcome,) = pipeline(model, reflection=False, plain_answer=False).make([item()])
    assert [stage for stage, *_ in model.asked] == ["hint", "damaged"]
    assert outcome.rows[0]["chosen"][0]["content"][0]["text"] == "first."
    assert "plain_right" not in outcome.notes


def test_images_are_damaged_too():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
    row = InputRow("r0", {"question": "What?", "answer": TRUTH}, images=("/data/0.png",))
    requests = dict(pipeline(None).preview(row, Media(images=(image,))))
    titles = list(requests)
    assert [title.split(",")[0] for title in titles] == [
        "first answer", "winning response", "losing response", "plain answer",
    ]  # fmt: skip
    assert text_of(requests[titles[1]]) == f"You said: <the first answer> Hint: {TRUTH} What?"
    damaged, plain = (requests[title].media.images[0] for title in titles[2:])
    assert damaged.size == image.size and plain is image
    assert not np.array_equal(np.asarray(damaged), np.asarray(image))


@pytest.mark.parametrize(
    ("stage", "what"),
    [("hint", "first answer"), ("reflection", "winning response"), ("damaged", "losing response")],
)
def test_a_failed_answer_rejects_its_row_and_no_other(stage, what):
    usual = Scripted().script[stage]
    model = Scripted({stage: {"r0": usual, "r1": Failure("cut off after 256 tokens"), "r2": usual}})
    before, failed, after = pipeline(model).make([item("r0"), item("r1"), item("r2")])
    assert failed.kind == "no answer"
    assert failed.reason.startswith(f"there is no {what}") and failed.reason.endswith("cut off after 256 tokens")
    assert [outcome.rows[0]["id"] for outcome in (before, after)] == ["r0", "r2"]
    later = ["hint", "reflection", "damaged", "plain"]
    later = later[later.index(stage) + 1 :]
    assert not [s for s, request, _ in model.asked if s in later and model.row_id(request) == "r1"]


def test_a_failed_plain_answer_costs_no_row():
    job = pipeline(Scripted({"plain": Failure("empty")}))
    (outcome,) = job.make([item()])
    assert outcome.rows and outcome.notes["plain_failure"] == "empty"
    figures = job.summarize([outcome])
    assert (figures["plain_right"], figures["chosen_right"], figures["plain_failures"]) == (0.0, 1.0, 1)


@pytest.mark.parametrize(
    "question, truth, chosen, rejected, kind",
    [
        ("Is it red?", "No.", "No, it is blue.", "No.", "losing response is right"),
        ("Is it red?", "No.", "Yes.", "It is red, I think.", "winning response is wrong"),
        ("Is it red?", "No.", "No, it is blue.", "Yes.", None),
        ("Which?\nA. red\nB. blue", "(B)", "B. blue", "It is blue.", "losing response is right"),
        ("Which?\nA. red\nB. blue", "(B)", "A. red", "green", "winning response is wrong"),
        ("How many?", "2", "There are two.", "two dogs", "losing response is right"),
        ("How many?", "2", "There are two.", "three", None),
        ("What does he ride?", "a bike", "a bicycle", "a horse", None),
        (
            "What moves?",
            TRUTH,
            "It goes to the left, the square.",
            "A red square moves left",
            "losing response is right",
        ),
    ],
)
def test_a_losing_response_that_is_right_is_no_pair(question, truth, chosen, rejected, kind):
    model = Scripted({"reflection": chosen, "damaged": rejected})
    (outcome,) = pipeline(model).make([item(question=question, answer=truth)])
    assert outcome.kind == kind and bool(outcome.rows) == (kind is None)


def test_identical_responses_are_no_pair():
    model = Scripted({"damaged": "A red square moves left"})
    (outcome,) = pipeline(model).make([item()])
    assert outcome.kind == "identical responses" and TRUTH in outcome.reason
    assert not model.scored


def test_a_reward_that_is_no_number_rejects_the_row():
    (outcome,) = pipeline(Scripted(rewards={TRUTH: math.nan})).make([item()])
    assert outcome.kind == "no reward" and "nan" in outcome.reason
    assert not any(isinstance(v, float) and math.isnan(v) for v in outcome.notes.values())


@pytest.mark.parametrize(
    ("setting", "boundary", "figure"),
    [("min_margin", 0.3, "reward margin"), ("min_trust", 0.8, "trust of"), ("min_trust_margin", 0.2, "trust margin")],
)
def test_filters_keep_what_is_exactly_at_the_boundary(setting, boundary, figure):
    # rewards -0.4 and -0.7 leave 0.29999999999999993; trusts 0.8 and 0.6
    script = {"reflection": "a red square moves up.", "damaged": "a blue square moves up."}
    model = Scripted(script, rewards={script["reflection"]: -0.4, script["damaged"]: -0.7})
    (kept,) = pipeline(model, **{setting: boundary}).make([item()])
    (dropped,) = pipeline(model, **{setting: boundary + 0.001}).make([item()])
    assert kept.rows and kept.rows[0]["chosen_trust"] == 0.8
    assert dropped.kind == f"below {setting}"
    assert figure in dropped.reason and f"{boundary:.4g}," in dropped.reason
    assert dropped.notes["answers"]["damaged"] == script["damaged"]  # it stays in the figures


def outcome_of(id, chosen, rejected):
    notes = {"chosen_trust": chosen, "rejected_trust": rejected}
    return Outcome(id, rows=(notes | {"id": id},), notes=notes)


def test_keep_top_takes_the_largest_margins_and_breaks_ties_by_id():
    failed = Outcome("e", reason="no", kind="no answer")
    # margins: d 0.5; b and c 0.30000000000000004, a 0.29999999999999993; f 0
    made = [outcome_of("c", 0.9, 0.6), outcome_of("d", 0.5, 0.0), failed, outcome_of("b", 0.8, 0.5)]
    made += [outcome_of("f", 1.0, 1.0), outcome_of("a", 0.7, 0.4)]
    for order in (made, made[::-1]):
        kept = keep_top(order, 0.5)  # 2.5 of 5 rows, rounded up
        assert [outcome.id for outcome in kept] == [outcome.id for outcome in order]
        assert {outcome.id for outcome in kept if outcome.rows} == {"d", "a", "b"}
        dropped = {outcome.id: outcome for outcome in kept if outcome.kind == "outside keep_top"}
        assert set(dropped) == {"c", "f"}
        assert "trust margin 0.3 is not among the 3 largest of 5" in dropped["c"].reason
        assert dropped["c"].notes == {"chosen_trust": 0.9, "rejected_trust": 0.6}
    assert next(outcome for outcome in kept if outcome.id == "e") is failed
    assert keep_top(made, 1.0) == made
    assert sum(bool(outcome.rows) for outcome in keep_top(made, 0.6)) == 3  # exactly, not rounded up to 4
    assert keep_top([], 0.5) == [] and keep_top([failed], 0.5) == [failed]


def test_select_is_keep_top_where_it_is_set():
    made = [outcome_of("a", 0.9, 0.6), outcome_of("b", 0.5, 0.4)]
    assert pipeline(Scripted()).select(made) is made
    assert [bool(outcome.rows) for outcome in pipeline(Scripted(), keep_top=0.5).select(made)] == [True, False]


def test_a_server_gives_no_rewards():
    job = pipeline(Server())
    outcomes = job.make([item("r0"), item("r1")])
    assert all(not key.endswith("_reward") for outcome in outcomes for key in outcome.rows[0])
    figures = job.summarize(outcomes)
    assert figures["chosen_right"] == 1.0 and not any("reward" in name for name in figures)
    for model, settings in ((Server(), {}), (None, {"server_url": "http://host:1/v1"})):
        with pytest.raises(GenerateError, match=r"min_margin is 0.1.*gives no rewards.*Leave min_margin out"):
            pipeline(model, min_margin=0.1, **settings)
    pipeline(None, min_margin=0.1)  # a dry run of a model in this process


def test_no_row_depends_on_its_neighbours():
    items = [item(f"r{i}", question=f"What is {i % 3}?") for i in range(30)]
    job = pipeline(Hashed(), min_margin=-0.3, min_trust=0.3)
    whole = {outcome.id: outcome for outcome in job.make(items)}
    kinds = {outcome.kind for outcome in whole.values()}
    assert kinds >= {None, "no answer", "below min_margin", "below min_trust"}
    for size in (1, 7):
        shuffled = [items[i] for i in np.random.default_rng(size).permutation(30)]
        for start in range(0, 30, size):
            batch = shuffled[start : start + size]
            outcomes = job.make(batch)
            assert [outcome.id for outcome in outcomes] == [row.id for row, _ in batch]
            assert outcomes == [whole[outcome.id] for outcome in outcomes]
    others = pipeline(Hashed(), min_margin=-0.3, min_trust=0.3, seed=1).make(items)
    assert [outcome.notes["answers"] for outcome in others] != [outcome.notes["answers"] for outcome in whole.values()]


def test_the_hint_is_in_no_row():
    question = "What {is} {answer} %s {0}?"  # braces in the data are only text
    model = Hashed()
    rows = [
        row for i in range(20) for o in pipeline(model).make([item(f"r{i}", question, "SECRET {x}")]) for row in o.rows
    ]
    assert len(rows) > 10
    for row in rows:
        assert row["prompt"][0]["content"][1]["text"] == question
        assert not any(word in json.dumps(row) for word in ("SECRET", "Hint:", "You said:"))
    (_, hint), (_, reflection), *_ = pipeline(model).preview(*item("r0", question, "SECRET {x}"))
    assert text_of(hint) == f"Hint: SECRET {{x}} {question}"
    assert text_of(reflection) == f"You said: <the first answer> Hint: SECRET {{x}} {question}"


def test_the_summary():
    script = {"plain": {"r0": TRUTH, "r1": "a red cross.", "r2": Failure("empty"), "r3": TRUTH}}
    script["damaged"] = {"r0": "a.", "r1": TRUTH, "r2": "a b.", "r3": Failure("empty")}
    model = Scripted(script, rewards={TRUTH: -0.5, "a.": -3.0, "a b.": -1.0})
    job = pipeline(model, min_margin=1.0)
    outcomes = job.make([item(f"r{i}") for i in range(4)])
    assert [outcome.kind for outcome in outcomes] == [None, "identical responses", "below min_margin", "no answer"]
    figures = job.summarize(outcomes)
    assert figures["pairs"] == 3 and figures["kept_pairs"] == 1
    assert figures["chosen_right"] == 1.0
    assert figures["rejected_right"] == figures["plain_right"] == pytest.approx(1 / 3)
    assert figures["rejected_reward"] == -2.0 and figures["kept_rejected_reward"] == -3.0
    assert figures["reward_accuracy"] == 1.0
    # rewards -0.5, -3, -0.5, -1 against trusts 1, 1/3, 1, 2/7: ranks 3.5, 1, 3.5, 2 and 3.5, 2, 3.5, 1
    assert figures["reward_trust_spearman"] == pytest.approx(3.5 / 4.5)
    assert figures["kept_reward_trust_spearman"] is None  # two points
    assert not any(name.startswith("kept_") for name in pipeline(model).summarize(outcomes))
    json.dumps(figures, allow_nan=False)


def test_the_summary_of_nothing():
    for outcomes in ([], [Outcome("a", reason="no file", kind="unreadable media")]):
        figures = pipeline(Scripted(), keep_top=0.5).summarize(outcomes)
        counts = {name for name in figures if name.endswith(("pairs", "plain_failures"))}
        assert len(counts) == 4 and {figures[name] for name in counts} == {0}
        assert {figures[name] for name in figures if name not in counts} == {None}


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"question": None}, False, "`question` is None"),
        ({"answer": "  "}, False, "`answer` is '  '"),
        ({"answer": 3}, False, "`answer` is 3"),
        ({"question": "<video>\nWhat moves?"}, False, "holds the marker <video>: take it out"),
        ({}, True, "neither a video nor an image"),
    ],
)
def test_inputs_that_cannot_be_used(changes, images, message):
    row = InputRow("r0", {"question": "What?", "answer": TRUTH} | changes, videos=() if images else ("/a.mp4",))
    with pytest.raises(InputError, match=message):
        pipeline(None).check(row)


def test_inputs_that_can():
    example = {"question": "What?", "answer": TRUTH}
    pipeline(None).check(InputRow("r0", example, videos=("/a.mp4",)))
    pipeline(None).check(InputRow("r0", example, images=("/a.png",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hint_prompt": "{question}"},
            r"hint_prompt.*missing placeholders \['answer'\].*Use \{answer\}, \{question\}",
        ),
        ({"hint_prompt": "{question} {answer} {first_answer}"}, r"unknown placeholders \['first_answer'\]"),
        ({"hint_prompt": "{question} {answer} {}"}, r"unknown placeholders \[''\]"),
        ({"hint_prompt": "{question.x} {answer}"}, r"unknown placeholders \['question.x'\]"),
        ({"hint_prompt": "{question!r} {answer:>9}"}, r"unknown placeholders \['answer', 'question'\]"),
        ({"hint_prompt": "{question} {answer} {"}, "hint_prompt is no template.*for braces of your own"),
        ({"reflection_prompt": HINT_PROMPT}, r"reflection_prompt.*missing placeholders \['first_answer'\]"),
        ({"num_damaged_frames": 0}, "num_damaged_frames is 0"),
        ({"flip_probability": 1.5}, "flip_probability is 1.5"),
        ({"min_trust": 1.1}, "min_trust is 1.1: give a number from 0 to 1"),
        ({"min_trust_margin": -2}, "min_trust_margin is -2: give a number from -1 to 1"),
        ({"min_margin": math.nan}, "min_margin is nan: give a finite number"),
        ({"keep_top": 0}, "keep_top is 0: give a share"),
        ({"keep_top": 20}, "keep_top is 20: give a share"),
        ({"temperature": -1}, "temperature -1"),  # the shared settings are still checked
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ValueError, match=message):
        LeanPOGenerateConfig(**settings)


def test_doubled_braces_are_braces():
    job = pipeline(None, hint_prompt='{{"a": 1}} {question} {answer}')
    assert text_of(job.preview(*item())[0][1]) == f'{{"a": 1}} What moves? {TRUTH}'


def test_settings_reach_the_damage():
    config = LeanPOGenerateConfig(num_damaged_frames=3, flip_probability=0.0)
    assert (config.damage_settings().num_frames, config.damage_settings().flip_p) == (3, 0.0)
    assert len(damaged_frames(item(), num_damaged_frames=3)) == 3
    assert len(damaged_frames(item())) == 2


def test_the_damage_of_a_row_is_its_own():
    row, media = item("r0")
    twin = InputRow("r1", row.example, videos=row.videos), media
    first = damaged_frames((row, media))
    assert np.array_equal(first, damaged_frames((row, media)))
    assert not np.array_equal(first, damaged_frames(twin))
    assert not np.array_equal(first, damaged_frames((row, media), seed=1))


def damaged_frames(item, **settings):
    requests = [request for title, request in pipeline(None, **settings).preview(*item) if title.startswith("losing")]
    return requests[0].media.videos[0].frames


# --- the testbed's base -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(items, pipeline, outcomes) of 16 clips of the small world, answered by the shipped base."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trl_vpo.models.local import LocalModel
    from trl_vpo.testbed.tiny_vlm import BASE

    folder = tmp_path_factory.mktemp("clips")
    samples = world.draw_samples("clip", 16, seed=11, habits=False)
    items = []
    for number, sample in enumerate(samples):
        path = str(world.write_sample(sample, folder / f"{number}.mp4"))
        example = {"question": language.PROMPTS["clip"], "answer": language.caption(sample.things)}
        media = Media(videos=(load_video(path, VideoOptions(num_frames=8)),))
        items.append((InputRow(f"r{number}", example, videos=(path,)), media))
    model = LocalModel(
        AutoModelForImageTextToText.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE), batch_size=16
    )
    job = pipeline(model, max_new_tokens=16)
    return items, job, job.make(items)


def test_the_base_makes_rows_to_train_on(made):
    items, job, outcomes = made
    figures = job.summarize(outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    assert len(rows) >= 10
    # the damage costs answers: motion cannot be told from two frames of a small part
    assert figures["rejected_right"] < figures["plain_right"]
    assert figures["rejected_trust"] < figures["chosen_trust"]
    assert figures["reward_accuracy"] > 0.5
    assert figures["answer_reward"] < 0
    for row in rows:
        read = read_row(row)
        assert read.prompt[0]["content"] == [{"type": "video"}, {"type": "text", "text": language.PROMPTS["clip"]}]
        assert row["videos"] == [items[int(row["id"][1:])][0].videos[0]]
    json.dumps([figures, [outcome.notes for outcome in outcomes]], allow_nan=False)


def test_rewards_are_those_of_the_plain_question_and_the_whole_clip(made):
    items, job, outcomes = made
    row = next(row for outcome in outcomes for row in outcome.rows)
    (request,) = [request for title, request in job.preview(*items[int(row["id"][1:])]) if title.startswith("plain")]
    responses = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
    rewards = job.model.average_logps([request] * 2, responses)
    assert rewards == pytest.approx([row["chosen_reward"], row["rejected_reward"]], abs=1e-4)


def test_smaller_batches_give_the_same_rows(made):
    items, job, outcomes = made
    for start in (0, 5):
        for outcome, again in zip(outcomes[start:], job.make(items[start : start + 3])):
            assert again.notes["answers"] == outcome.notes["answers"]
            assert (again.kind, again.notes.keys()) == (outcome.kind, outcome.notes.keys())
            for name in again.notes.keys() - {"answers"}:
                assert again.notes[name] == pytest.approx(outcome.notes[name], abs=1e-4)
