"""LeanPO's pipeline: what is asked, what becomes a row, what is dropped and why, and what the summary says."""

import json
import math

import numpy as np
import pytest
from leanpo_kit import TRUTH, Hashed, Scripted, Server, item, pipeline, row_id, stage
from PIL import Image
from scripted_models import text_of

from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import read_row
from trl_vpo.errors import GenerateError, InputError
from trl_vpo.media.load import Media
from trl_vpo.models.requests import stream_seed
from trl_vpo.text.responses import Failure


def test_what_is_asked_and_the_row_that_comes_of_it():
    model = Scripted(rewards={TRUTH: -0.25, "a blue square moves up.": -2.0})
    row, media = item()
    (outcome,) = pipeline(model, seed=7).make([(row, media)])
    assert [(stage(request), text_of(request)) for request in model.asked] == [
        ("hint", f"Hint: {TRUTH} What moves?"),
        ("reflection", f"You said: first. Hint: {TRUTH} What moves?"),
        ("damaged", "What moves?"),
        ("plain", "What moves?"),
    ]
    for (request,), sampling in model.calls:
        name = stage(request)
        assert request.messages[0]["content"][0] == {"type": "video"} and len(request.messages) == 1
        assert request.seed == stream_seed(7, "r0", name)
        assert (sampling.temperature, sampling.top_p) == (0.0 if name == "plain" else 1.0, 0.9)
        assert (request.media is media) == (name != "damaged")
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
    assert [stage(request) for request in model.asked] == ["hint", "damaged"]
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
    ("failed_stage", "what"),
    [("hint", "first answer"), ("reflection", "winning response"), ("damaged", "losing response")],
)
def test_a_failed_answer_rejects_its_row_and_no_other(failed_stage, what):
    usual = Scripted().script[failed_stage]
    model = Scripted({failed_stage: {"r0": usual, "r1": Failure("cut off after 256 tokens"), "r2": usual}})
    before, failed, after = pipeline(model).make([item("r0"), item("r1"), item("r2")])
    assert failed.kind == "no answer"
    assert failed.reason.startswith(f"there is no {what}") and failed.reason.endswith("cut off after 256 tokens")
    assert [outcome.rows[0]["id"] for outcome in (before, after)] == ["r0", "r2"]
    assert [stage(request) for request in model.asked if row_id(request) == "r1"][-1] == failed_stage


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
        ("What moves?", TRUTH, "It goes to the left.", "A red square moves left", "losing response is right"),
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
    assert len(rows) > 5
    for row in rows:
        assert row["prompt"][0]["content"][1]["text"] == question
        assert not any(word in json.dumps(row) for word in ("SECRET", "Hint:", "You said:"))
    ((_, braces), *_) = pipeline(None, hint_prompt='{{"a": 1}} {question} {answer}').preview(*item())
    assert text_of(braces) == f'{{"a": 1}} What moves? {TRUTH}'


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"question": None}, False, "`question` is None"),
        ({"answer": 3}, False, "`answer` is 3"),
        ({}, True, "neither a video nor an image"),
    ],
)
def test_inputs_that_cannot_be_used(changes, images, message):
    row = InputRow("r0", {"question": "What?", "answer": TRUTH} | changes, videos=() if images else ("/a.mp4",))
    with pytest.raises(InputError, match=message):
        pipeline(None).check(row)
    for media in ({"videos": ("/a.mp4",)}, {"images": ("/a.png",)}):
        pipeline(None).check(InputRow("r0", {"question": "What?", "answer": TRUTH}, **media))


def test_the_damage_of_a_row_is_its_own():
    row, media = item("r0")
    twin = InputRow("r1", row.example, videos=row.videos), media
    first = damaged_frames((row, media))
    assert np.array_equal(first, damaged_frames((row, media))) and len(first) == 2
    assert not np.array_equal(first, damaged_frames(twin))
    assert not np.array_equal(first, damaged_frames((row, media), seed=1))
    assert len(damaged_frames((row, media), num_damaged_frames=3)) == 3
    straight, flipped = (damaged_frames((row, media), flip_probability=p) for p in (0.0, 1.0))
    assert np.array_equal(straight, flipped[:, :, ::-1])


def damaged_frames(item, **settings):
    requests = [request for title, request in pipeline(None, **settings).preview(*item) if title.startswith("losing")]
    return requests[0].media.videos[0].frames
