"""LPOI's questions about hidden objects: hard negatives, the visibility check, and their summary."""

import numpy as np
import pytest
from lpoi_kit import BENCH, DOG, MAN, TREE, Claims, made_row, make_row, pipeline, run

from trl_vpo.media.images import load_image
from trl_vpo.media.masking import masked_image_list
from trl_vpo.text.responses import Failure


def test_an_object_that_is_not_claimed_makes_room_for_the_next(tmp_path):
    model = Claims(lambda question, image: "a bench" in question)
    row = make_row(tmp_path, objects=[TREE, BENCH, DOG, MAN])
    (outcome,) = run(pipeline(model, hard_negative=True), row)
    assert made_row(outcome)["critical_object"] == "bench"
    claims = [(item["label"], item["claimed"]) for item in outcome.notes["asked"]]
    assert claims == [("man", False), ("dog", False), ("bench", True)]
    names = ("man", "dog", "bench")
    assert model.questions == [[f"Is there a {name} in the image? Answer yes or no."] for name in names]


def test_the_model_sees_the_last_item_and_answers_greedily(tmp_path):
    model = Claims(lambda question, image: True)
    row = make_row(tmp_path, objects=[DOG])
    run(pipeline(model, hard_negative=True, visual_prompt=False), row)
    (((request,), sampling),) = model.calls
    expected = masked_image_list(load_image(row.images[0]), DOG["box"], 2, visual_prompt=False)[-1]
    assert (np.asarray(request.media.images[0]) == np.asarray(expected)).all()
    assert sampling.temperature == 0


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (False, "no hard negative"),
        ("I cannot tell.", "no hard negative"),
        ("a dog", "no hard negative"),
        (Failure("the server is gone"), "no answer"),
    ],
)
def test_no_hard_negative(tmp_path, answer, kind):
    rows = [make_row(tmp_path, name, objects=[DOG, MAN]) for name in "ab"]
    model = Claims(lambda question, image: answer)
    first, second = run(pipeline(model, hard_negative=True), *rows)
    assert first.kind == second.kind == kind
    assert first.reason == second.reason
    if kind == "no answer":
        assert first.reason == "the question about the hidden 'man': the server is gone"
    else:
        assert first.reason == "the model does not claim what is hidden (man, dog)."
        assert [len(call) for call in model.questions] == [2, 2]  # both rows in one call


def test_the_question_can_be_another(tmp_path):
    model = Claims(lambda question, image: True)
    row = make_row(tmp_path, objects=[{"label": "umbrella", "box": [0, 0, 20, 20]}])
    run(pipeline(model, hard_negative=True, presence_question="{Look} Is there {object}?"), row)
    assert model.questions[0][0] == "{Look} Is there an umbrella?"


# --- the visibility check -----------------------------------------------------------------------------------------


def test_claims_fall_as_the_object_is_hidden(tmp_path):
    def says(question, image):  # the dog is white: the share of the box that is black
        x0, y0, x1, y1 = DOG["box"] if "dog" in question else MAN["box"]
        dark = (np.asarray(image)[y0:y1, x0:x1] == 0).all(-1).mean()
        return bool(dark < (0.3 if "dog" in question else 0.8))

    rows = [make_row(tmp_path, "a", objects=[DOG]), make_row(tmp_path, "b", objects=[MAN])]
    job = pipeline(Claims(says), visibility_check=True, visual_prompt=False)
    outcomes = run(job, *rows)
    assert outcomes[0].notes["claimed_at"] == [True, True, False, False, False]
    assert outcomes[1].notes["claimed_at"] == [True, True, True, True, False]
    assert job.summarize(outcomes)["claimed_at"] == [1.0, 1.0, 0.5, 0.5, 0.0]


def test_an_answer_that_fails_is_left_out_of_the_share(tmp_path):
    answers = iter([True, Failure("cut off"), True, False, False, True, True, True, True, False])
    job = pipeline(Claims(lambda question, image: next(answers)), visibility_check=True)
    outcomes = run(job, *(make_row(tmp_path, name, objects=[DOG]) for name in "ab"))
    assert outcomes[0].notes["claimed_at"] == [True, None, True, False, False]
    assert job.summarize(outcomes)["claimed_at"] == [1.0, 1.0, 1.0, 0.5, 0.0]


# --- the summary ------------------------------------------------------------------------------------------------


def test_the_summary_by_hand(tmp_path):
    model = Claims(lambda question, image: "man" not in question)
    job = pipeline(model, hard_negative=True)
    rows = [
        make_row(tmp_path, "a", objects=[MAN, DOG]),
        make_row(tmp_path, "b", objects=[MAN]),
        make_row(tmp_path, "c", objects=[DOG, {"label": "dog", "box": [40, 40, 50, 50]}]),
        make_row(tmp_path, "d", objects=[{"label": "cup", "box": [0, 0, 28, 14]}]),
        make_row(tmp_path, "e", objects=[]),
    ]
    figures = job.summarize(run(job, *rows))
    assert figures == {
        "named_in": {"objects_column": 0, "first sentence": 2, "question": 0, "rest": 0, "any": 1},
        "box_area_mean": pytest.approx((400 + 400 + 392) / 3 / 56**2),
        "box_score_mean": None,
        "several_instances": pytest.approx(1 / 3),
        "labels": {"dog": 2, "cup": 1},
        "hard_negatives": {"asked": 5, "claimed": 0.6, "inputs": 0.75},
    }
    assert list(figures["labels"]) == ["dog", "cup"]


def test_a_summary_of_nothing(tmp_path):
    job = pipeline(Claims(None), hard_negative=True, visibility_check=True)
    figures = job.summarize(run(job, make_row(tmp_path, objects=[])))
    assert figures["box_area_mean"] is None and figures["labels"] == {} and figures["claimed_at"] == []
    assert figures["hard_negatives"] == {"asked": 0, "claimed": None, "inputs": None}
