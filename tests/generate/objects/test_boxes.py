"""Boxes of critical objects: the choice, known boxes in three forms, and what they are called."""

from types import SimpleNamespace

import pytest

from trl_vpo.errors import InputError
from trl_vpo.generate.objects.boxes import Detection, annotated, area_share, choices, clip_box, match
from trl_vpo.generate.objects.nouns import Candidate

SIZE = (100, 50)  # width, height
DOG, CAT, BALL = Candidate("dog", "first sentence"), Candidate("cat", "question"), Candidate("ball", "rest")


RULES = {"box_threshold": 0.3, "min_box_area": 0.01, "max_box_area": 0.9, "instances": "best"}


def chosen(detections, candidates=(DOG, CAT, BALL), **rules):
    """(label, box, where, instances) of the choices among (label, box, score)."""
    detections = [Detection(*detection) for detection in detections]
    result = choices(detections, candidates, SIZE, SimpleNamespace(**RULES | rules))
    return [(choice.label, choice.box, choice.where, choice.instances) for choice in result]


# --- the choice -------------------------------------------------------------------------------------------------


def test_candidates_come_in_their_order_each_with_its_best_box():
    boxes = [
        ("ball", (0, 0, 10, 10), 0.9),
        ("dog", (0, 0, 20, 20), 0.5),
        ("dog", (60, 10, 90, 40), 0.8),
        ("dog", (61, 10, 91, 40), 0.7),  # the same dog again: overlap 29/31
        ("dog", (30, 0, 50, 20), 0.2),  # below the threshold
    ]
    assert chosen(boxes) == [("dog", (60, 10, 90, 40), "first sentence", 2), ("ball", (0, 0, 10, 10), "rest", 1)]


def test_a_union_hides_all_instances():
    cat = ("cat", (0, 0, 10, 10), 0.9)
    again = ("dog", (61, 10, 91, 41), 0.7)  # shows the second dog again, so its edges do not count
    boxes = [("dog", (0, 5, 20, 20), 0.5), ("dog", (60, 10, 90, 40), 0.8), again, cat]
    assert chosen(boxes, instances="union")[0] == ("dog", (0, 5, 90, 40), "first sentence", 2)
    whole_image = [("dog", (0, 0, 20, 50), 0.5), ("dog", (60, 0, 100, 50), 0.8), cat]
    assert chosen(whole_image, instances="union")[0][0] == "cat"


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        ((10, 10, 10, 40), False),  # no width
        ((10, 10, 40, 10), False),  # no height
        ((0, 0, 7, 7), False),  # 49 of 5000 pixels, below 1 %
        ((0, 0, 100, 46), False),  # 92 %
        ((0, 0, 10, 5), True),  # 1 %
        ((0, 0, 90, 50), True),  # 90 %
    ],
)
def test_boxes_that_cannot_be_critical_are_passed_over(box, fits):
    dog, cat = ("dog", box, 0.9), ("cat", (0, 0, 10, 10), 0.4)
    assert chosen([dog, cat])[0][0] == ("dog" if fits else "cat")
    assert chosen([dog]) == ([("dog", box, "first sentence", 1)] if fits else [])
    assert chosen([("dog", (0, 0, 0, 0), 0.9)], min_box_area=0.0) == []


def test_any_detection_only_where_no_candidate_is_found():
    boxes = [("tree", (0, 0, 20, 20), 0.5), ("car", (30, 0, 60, 20), 0.7)]
    assert chosen(boxes) == [("car", (30, 0, 60, 20), "any", 1), ("tree", (0, 0, 20, 20), "any", 1)]
    assert chosen([*boxes, ("ball", (0, 0, 10, 10), 0.3)]) == [("ball", (0, 0, 10, 10), "rest", 1)]
    # a candidate whose only box is too small is not "any" either
    assert chosen([("dog", (0, 0, 2, 2), 0.9)]) == []


def test_annotations_have_no_score_and_the_largest_counts():
    boxes = [("dog", (0, 0, 10, 10)), ("dog", (50, 0, 80, 30)), ("tree", (0, 20, 40, 50))]
    assert chosen(boxes) == [("dog", (50, 0, 80, 30), "first sentence", 2)]
    assert [c[0] for c in chosen([*boxes, ("car", (0, 0, 60, 40))], [])] == ["car", "tree", "dog"]


def test_the_order_of_detections_does_not_matter():
    boxes = [("dog", (0, 0, 20, 20), 0.5), ("dog", (40, 0, 60, 20), 0.5), ("x", (0, 0, 9, 9), 0.5)]
    for candidates in ([DOG, CAT, BALL], []):
        assert chosen(boxes, candidates) == chosen(boxes[::-1], candidates)


def test_boxes_are_clipped_and_rounded_outwards():
    assert clip_box((1.2, 2.7, 10.1, 20.0), SIZE) == (1, 2, 11, 20)
    assert clip_box((-5, -0.5, 120, 50.4), SIZE) == (0, 0, 100, 50)
    assert clip_box((110, 10, 120, 20), SIZE) == (100, 10, 100, 20)  # outside: empty
    assert area_share((0, 0, 50, 25), SIZE) == 0.25
    assert area_share((10, 10, 5, 20), SIZE) == 0


# --- known boxes ------------------------------------------------------------------------------------------------

EXPECTED = [Detection("dog", (10, 5, 30, 25)), Detection("tennis racket", (50, 0, 60, 40))]
FORMS = {
    "ours": [{"label": "Dogs", "box": [10, 5, 30, 25]}, {"label": "tennis racket", "box": [50, 0, 60, 40]}],
    "coco": {"id": [7, 9], "bbox": [[10, 5, 20, 20], [50.0, 0.0, 10.0, 40.0]], "category": ["dog", "tennis_racket"]},
    "coco numbers": {"bbox": [[10, 5, 20, 20], [50, 0, 10, 40]], "category": [1, 0]},
    "coco list": [{"bbox": [10, 5, 20, 20], "category": "dog"}, {"bbox": [50, 0, 10, 40], "category": 0}],
    "visual genome": [
        {"x": 10, "y": 5, "w": 20, "h": 20, "names": ["the dog"]},
        {"x": 50, "y": 0, "w": 10, "h": 40, "names": ["tennis racket"], "synsets": None},
    ],
    "visual genome dict": {"x": [10, 50], "y": [5, 0], "w": [20, 10], "h": [20, 40], "name": ["dog", "tennis racket"]},
    "arrow": [
        {"label": "dog", "box": [10, 5, 30, 25], "bbox": None, "category": None},
        {"label": None, "box": None, "bbox": [50, 0, 10, 40], "category": "tennis racket"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_known_boxes(form):
    assert annotated(FORMS[form], SIZE, ["tennis racket", "dog"]) == EXPECTED


def test_several_names_and_boxes_that_reach_out_a_little():
    objects = [{"x": 0, "y": 0, "w": 9, "h": 9, "names": ["man", "guy"]}]
    assert [detection.label for detection in annotated(objects, SIZE)] == ["man", "guy"]
    assert annotated([{"label": "dog", "box": [-1.5, 0, 101, 51]}], SIZE)[0].box == (0, 0, 100, 50)
    assert annotated({"bbox": [], "category": []}, SIZE) == []


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("dog", "'dog', not a list"),
        ([["dog", 1, 2, 3, 4]], "not a list of boxes"),
        ({"bbox": [[0, 0, 9, 9]], "category": []}, "lists of different lengths"),
        ([{"label": "dog"}], "annotation 0 has the keys ['label']"),
        ([{"box": [0, 0, 9, 9]}], "annotation 0 is called [None]"),
        ([{"label": " ", "box": [0, 0, 9, 9]}], "annotation 0 is called [' ']"),
        ([{"label": "dog", "box": [0, 0, 9, 9]}, {"label": "cat", "box": [0, 0, 9]}], "annotation 1 has the box"),
        ([{"label": "dog", "box": [0, 0, float("nan"), 9]}], "four finite numbers"),
        ([{"label": "dog", "box": [50, 0, 20, 9]}], "inverted"),
        ([{"category": "dog", "bbox": [0, 0, -5, 9]}], "inverted"),
        ([{"category": "dog", "bbox": [50, 0, 90, 9]}], "[50, 0, 140, 9] in an image of 100x50"),
        ([{"category": 2, "bbox": [0, 0, 5, 9]}], "the category number 2, and `categories` has 2 names"),
    ],
)
def test_annotations_that_are_wrong(objects, message):
    with pytest.raises(InputError) as error:
        annotated(objects, SIZE, ["cat", "dog"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("label", "text", "same"),
    [
        ("dining table", "table", True),
        ("dog", "small brown dog", True),
        ("red square", "square", True),
        ("person", "young man", True),
        ("person", "girl", True),
        ("cell phone", "smartphone", True),
        ("wine glass", "wine glasses", True),
        ("couch", "gray sofa", True),
        ("red square", "blue square", False),
        ("woman", "man", False),
        ("dining table", "coffee table", False),
        ("table", "table cloth", False),
        ("cat", "wildcat", False),
        ("cat", "dog", False),
    ],
)
def test_labels_that_mean_a_candidate(label, text, same):
    (detection,) = match([Detection(label, (0, 0, 9, 9))], [Candidate(text, "rest")])
    assert detection.label == (text if same else label)


def test_the_same_name_comes_before_one_within_the_other():
    brown, dog, tree = (Detection(name, (0, 0, 9, 9)) for name in ("brown dog", "dog", "tree"))
    candidates = [Candidate(name, "rest") for name in ("brown dog", "dog", "sky")]
    assert match([dog, brown, tree], candidates) == [brown, dog, tree]
    assert match([dog], candidates) == [brown, dog]  # one box can be what two candidates mean
