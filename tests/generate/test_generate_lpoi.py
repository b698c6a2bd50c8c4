"""LPOI's pipeline: which object becomes critical, what the row is, what the model is asked, and the summary."""

import hashlib

import numpy as np
import pytest
from detector_models import save
from helpers import message, write_image
from lpoi_kit import BENCH, CHOSEN, DOG, MADE, MAN, TREE, Claims, Fixed, made_row, make_row, pipeline, run

from trl_vpo.data.inputs import InputRow, load_media
from trl_vpo.data.rows import read_row
from trl_vpo.errors import InputError
from trl_vpo.generate.objects.boxes import Detection
from trl_vpo.media.images import load_image
from trl_vpo.media.load import VideoOptions
from trl_vpo.media.masking import hidden_box
from trl_vpo.testbed import rows as testbed

# --- the small world ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    rows = testbed.write_inputs("scene", 12, 3, tmp_path_factory.mktemp("scenes"))
    return [InputRow(row["id"], row, images=tuple(row["images"])) for row in rows]


def test_scenes_with_known_boxes(scenes):
    outcomes = run(pipeline(), *scenes)
    for row, outcome in zip(scenes, outcomes, strict=True):
        first = row.example["objects"][0]  # captions begin with the thing on the left
        caption = row.example["chosen"][0]["content"][0]["text"]
        words = caption.split(".")[0].split()  # "there is a large green table", or "one sees" it
        assert words[5] == first["label"]
        assert made_row(outcome) == row.example | {
            "critical_box": first["box"],
            "critical_object": " ".join(words[3:]),  # with size and colour, the annotation knows the noun only
            "box_source": "annotation",
            "box_score": None,
            "generated_by": MADE,
        }
        assert outcome.notes["where"] == "first sentence" and outcome.notes["instances"] == 1


def test_again_and_in_another_batch_the_outcomes_are_the_same(scenes):
    def says(question, image):  # whatever, as long as it depends on all that is asked
        return hashlib.md5(question.encode() + image.tobytes()).digest()[0] % 2 == 0

    def outcomes(*batches):
        job = pipeline(Claims(says), hard_negative=True, visibility_check=True)
        return {outcome.id: outcome for batch in batches for outcome in run(job, *batch)}

    together = outcomes(scenes)
    assert len({outcome.kind for outcome in together.values()}) == 2  # kept ones, and such without a hard negative
    assert together == outcomes(scenes) == outcomes(scenes[::-1]) == outcomes(scenes[:5], scenes[5:])
    assert together == outcomes(*([row] for row in scenes))


# --- which object -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "label", "where"),
    [
        ([TREE, BENCH, DOG, MAN], "man", "first sentence"),
        ([TREE, BENCH, DOG], "dog", "first sentence"),
        ([TREE, BENCH], "bench", "question"),
        ([TREE], "tree", "rest"),
        ([{"label": "car", "box": [0, 0, 9, 9]}, {"label": "bus", "box": [0, 0, 20, 20]}], "bus", "any"),
        ([{"label": "person", "box": [0, 0, 20, 20]}, DOG], "man", "first sentence"),
    ],
)
def test_the_order_of_the_parts(tmp_path, objects, label, where):
    (outcome,) = run(pipeline(), make_row(tmp_path, objects=objects))
    row = made_row(outcome)
    assert (row["critical_object"], outcome.notes["where"]) == (label, where)
    names = {"man": ("man", "person")}.get(label, (label,))
    assert row["critical_box"] == next(o["box"] for o in objects if o["label"] in names)


def test_rows_bring_their_own_candidates(tmp_path):
    job = pipeline(objects_column="things")
    row = make_row(tmp_path, objects=[TREE, BENCH, DOG, MAN], things=["cat", " Tree "])
    (outcome,) = run(job, row)
    assert made_row(outcome)["critical_object"] == "Tree"
    assert outcome.notes["where"] == "objects_column"
    for bad in (None, "tree", ["tree", 3], ["?"]):
        with pytest.raises(InputError, match="`things` is"):
            job.check(make_row(tmp_path, objects=[TREE], things=bad))


def test_a_detector_is_asked_for_the_candidates(tmp_path):
    detector = Fixed(Detection("dog", (5, 5, 25, 25), 0.6), Detection("bench", (20, 20, 54, 54), 0.9))
    job = pipeline(finds=detector)
    outcomes = run(job, make_row(tmp_path, "a"), make_row(tmp_path, "b", chosen="A bench."))
    row = made_row(outcomes[0])
    assert detector.asked[0] == ["man", "dog", "bench", "tree"]
    assert (row["critical_box"], row["critical_object"], row["box_source"]) == ([5, 5, 25, 25], "dog", "detector")
    assert row["box_score"] == outcomes[0].notes["score"] == 0.6
    assert outcomes[0].notes["area"] == 400 / 56**2
    assert job.summarize(outcomes)["box_score_mean"] == pytest.approx(0.75)
    run(pipeline(finds=detector, max_candidates=2), make_row(tmp_path))
    assert detector.asked[-1] == ["man", "dog"]


def test_fallback_labels_are_for_rows_without_a_find(tmp_path):
    boxes = {"dog": ((5, 5, 25, 25), 0.6), "cup": ((0, 0, 20, 20), 0.4), "hat": ((0, 0, 9, 9), 0.7)}
    detector = Fixed(*(Detection(label, *found) for label, found in boxes.items()))
    rows = [make_row(tmp_path, "a"), make_row(tmp_path, "b", chosen="A red kite.", question="What is it?")]
    settings = {"fallback_labels": ["cup", "hat", "dog"]}
    first, second = run(pipeline(finds=detector, **settings), *rows)
    assert detector.asked == [["man", "dog", "bench", "tree"], ["red kite"], ["cup", "hat", "dog"]]
    assert made_row(first)["critical_object"] == "dog"
    assert (made_row(second)["critical_object"], second.notes["where"]) == ("hat", "any")
    (rejected,) = run(pipeline(finds=Fixed(), fallback_labels=[]), rows[1])
    assert rejected.kind == "no object found"
    assert rejected.reason == "the text names red kite; boxes found: 0, none of 0.005 to 0.9 of the image."


def test_nothing_usable_is_rejected(tmp_path):
    bad = make_row(tmp_path, "bad", objects=[{"label": "dog", "box": [5, 5, 900, 25]}])
    small = [{"label": "dog", "box": [5, 5, 6, 6]}]
    tiny = make_row(tmp_path, "tiny", objects=small, chosen="It is asleep.", question="Why?")
    bad, tiny, good = run(pipeline(), bad, tiny, make_row(tmp_path, "good", objects=[DOG]))
    assert bad.kind == "unusable input" and "annotation 0 has the corners [5, 5, 900, 25]" in bad.reason
    assert tiny.kind == "no object found"
    assert tiny.reason.startswith("the text names nothing that can be seen; boxes found: 1")
    assert made_row(good)["critical_object"] == "dog"


def test_boxes_are_in_the_stored_size_whatever_max_pixels(tmp_path):
    detector = Fixed(Detection("dog", (200, 100, 300, 200), 0.6))
    row = make_row(tmp_path, image=write_image(tmp_path / "large.png", (400, 300)))
    (outcome,) = run(pipeline(finds=detector, max_pixels=1000), row)
    assert detector.sizes == [(400, 300)]
    assert made_row(outcome)["critical_box"] == [200, 100, 300, 200]


def test_columns_that_the_row_replaces(tmp_path):
    row = make_row(tmp_path, objects=[DOG], critical_box=[0, 0, 1, 1], image_list=["x", "y"], extra=3)
    row.example["image"] = row.example.pop("images")[0]
    (outcome,) = run(pipeline(), row)
    training = made_row(outcome)
    assert training["critical_box"] == DOG["box"] and training["images"] == list(row.images)
    assert not {"image", "image_list"} & set(training)
    assert training["extra"] == 3 and training["prompt"] == row.example["prompt"]


# --- real models --------------------------------------------------------------------------------------------------


def test_a_detector_and_a_mask_model_by_name(tmp_path, scenes):
    settings = {
        "boxes": "detector",
        "detector": save("owlv2", tmp_path / "owl"),
        "mask_model": save("sam2", tmp_path / "sam"),
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "box_threshold": 0.0,
        "num_images": 3,
    }
    outcomes = run(pipeline(**settings), *scenes[:4])
    for scene, outcome in zip(scenes, outcomes):
        row = made_row(outcome)
        assert row["box_source"] == "detector" and 0 < row["box_score"] <= 1
        assert row["critical_object"].split()[-1] in [thing["label"] for thing in scene.example["objects"]]
        read = read_row(row, media_form="ranking")
        assert read.media_list == [([item], []) for item in row["image_list"]] and len(read.media_list) == 3
        assert read.images == [scene.images[0]]
        x0, y0, x1, y1 = row["critical_box"]
        first, *_, last = (np.asarray(load_image(path)) for (path,), _ in read.media_list)
        assert ((last != first).any(-1) & (last == 0).all(-1))[y0:y1, x0:x1].any()
    assert outcomes == run(pipeline(**settings), *scenes[:4])
    assert outcomes[1:2] == run(pipeline(**settings), scenes[1])


def test_an_empty_mask_makes_room_for_the_next(tmp_path):
    class Empty:
        def masks(self, images, boxes):
            return [np.full((image.height, image.width), box == tuple(full)) for image, box in zip(images, boxes)]

    job = pipeline(mask_model="none", output_dir=str(tmp_path / "run"))
    job.finder.segmenter, full = Empty(), DOG["box"]
    (outcome,) = run(job, make_row(tmp_path, objects=[MAN, DOG]))
    assert made_row(outcome)["critical_object"] == "dog"
    (outcome,) = run(job, make_row(tmp_path, objects=[MAN]))
    assert (outcome.kind, outcome.reason) == ("empty mask", "none finds no outline in the box of any object.")


# --- around it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "0 images and 0 videos"),
        ({"images": ["a.png", "b.png"]}, "2 images and 0 videos"),
        ({"rejected": None}, "has no `rejected`"),
        ({"rejected": message("assistant", CHOSEN)}, "identical"),
        ({"prompt": message("user", "no placeholder", "<image>", "<image>")}, "2 image placeholder"),
        ({"objects": None}, "no `objects`"),
    ],
)
def test_inputs_that_cannot_be_used(tmp_path, change, message):
    row = make_row(tmp_path, objects=[DOG])
    example = {key: value for key, value in (row.example | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        pipeline().check(InputRow("a", example, images=tuple(example["images"])))


def test_what_a_dry_run_shows(tmp_path):
    row = make_row(tmp_path, objects=[DOG])
    media = load_media(row, VideoOptions())
    ((title, request),) = pipeline(hard_negative=True, num_images=3).preview(row, media)
    assert title == "critical object: dog (first sentence), box [5, 5, 25, 25]"
    assert len(request.media.images) == 3 == sum(part["type"] == "image" for part in request.messages[0]["content"])
    x0, y0, x1, y1 = hidden_box(DOG["box"], (56, 56), 2, 3)
    assert (np.asarray(request.media.images[2])[y0:y1, x0:x1] == 0).all()
    steps = pipeline(boxes="detector", hard_negative=True).preview(row, media)  # no detector is loaded
    assert [title for title, _ in steps] == [
        "IDEA-Research/grounding-dino-tiny looks for",
        "about an object, hidden with its box",
    ]
    texts = [request.messages[0]["content"][-1]["text"] for _, request in steps]
    assert texts == [
        "man (first sentence), dog (first sentence), bench (question), tree (rest)",
        "Is there <the object> in the image? Answer yes or no.",
    ]
    with pytest.raises(InputError, match="the text names man"):
        pipeline().preview(make_row(tmp_path, objects=[]), media)
