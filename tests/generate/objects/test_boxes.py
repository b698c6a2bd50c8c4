"""Boxes of critical objects: the choice, known boxes in three forms, and what they are called."""

from types import SimpleNamespace

import pytest

from trl_vpo.errors import InputError
from trl_vpo.generate.objects.boxes import Detection, annotated, area_share, choices, clip_box, match
from trl_vpo.generate.objects.nouns import Candidate

SIZE = (100, 50)  # width, height
DOG, CAT, BALL = Candidate("dog", "first sentence"), Candidate("cat", "question"), Candidate("ball", "rest")


def rules(**changes):
    return SimpleNamespace(
        **{"box_threshold": 0.3, "min_box_area": 0.01, "max_box_area": 0.9, "instances": "best"} | changes
    )


def chosen(detections, candidates=(DOG, CAT, BALL), **changes):
    found = choices(detections, candidates, SIZE, rules(**changes))
    return [(choice.label, choice.box, choice.where, choice.instances) for choice in found]


# --- the choice -------------------------------------------------------------------------------------------------


def test_the_first_candidate_with_a_detection_comes_first():
    found = [Detection("ball", (0, 0, 10, 10), 0.9), Detection("cat", (20, 20, 40, 40), 0.4)]
    assert chosen(found) == [
        ("cat", (20, 20, 40, 40), "question", 1),
        ("ball", (0, 0, 10, 10), "rest", 1),
    ]
    assert choices(found, [DOG, CAT, BALL], SIZE, rules())[0].score == 0.4


def test_the_best_of_several_boxes_is_taken_others_counted():
    found = [
        Detection("dog", (0, 0, 20, 20), 0.5),
        Detection("dog", (60, 10, 90, 40), 0.8),
        Detection("dog", (61, 10, 91, 40), 0.7),  # the same dog again: overlap 29/31
        Detection("dog", (30, 0, 50, 20), 0.2),  # below the threshold
    ]
    assert chosen(found) == [("dog", (60, 10, 90, 40), "first sentence", 2)]


def test_a_union_hides_all_instances():
    found = [
        Detection("dog", (0, 5, 20, 20), 0.5),
        Detection("dog", (60, 10, 90, 40), 0.8),
        Detection("dog", (61, 10, 91, 41), 0.7),  # shows the second dog again, so its edges do not count
        Detection("cat", (0, 0, 10, 10), 0.9),
    ]
    assert chosen(found, instances="union")[0] == ("dog", (0, 5, 90, 40), "first sentence", 2)
    # a union of nearly the whole image is none
    found[0] = Detection("dog", (0, 0, 20, 50), 0.5)
    found[1] = Detection("dog", (60, 0, 100, 50), 0.8)
    assert chosen(found, instances="union")[0][0] == "cat"


@pytest.mark.parametrize(
    "box",
    [
        (10, 10, 10, 40),  # no width
        (10, 10, 40, 10),  # no height
        (0, 0, 7, 7),  # 49 of 5000 pixels, below 1 %
        (0, 0, 100, 46),  # 92 %
    ],
)
def test_boxes_that_cannot_be_critical_are_passed_over(box):
    assert chosen([Detection("dog", box, 0.9), Detection("cat", (0, 0, 10, 10), 0.4)])[0][0] == "cat"
    assert chosen([Detection("dog", box, 0.9)]) == []


def test_limits_of_the_area_are_included():
    assert chosen([Detection("dog", (0, 0, 10, 5), 0.9)]) == [("dog", (0, 0, 10, 5), "first sentence", 1)]  # 1 %
    assert chosen([Detection("dog", (0, 0, 90, 50), 0.9)]) == [("dog", (0, 0, 90, 50), "first sentence", 1)]  # 90 %
    assert chosen([Detection("dog", (0, 0, 0, 0), 0.9)], min_box_area=0.0) == []


def test_any_detection_only_where_no_candidate_is_found():
    found = [Detection("tree", (0, 0, 20, 20), 0.5), Detection("car", (30, 0, 60, 20), 0.7)]
    assert chosen(found) == [("car", (30, 0, 60, 20), "any", 1), ("tree", (0, 0, 20, 20), "any", 1)]
    assert chosen([*found, Detection("ball", (0, 0, 10, 10), 0.3)]) == [("ball", (0, 0, 10, 10), "rest", 1)]
    # a candidate whose only box is too small is not "any" either
    assert chosen([Detection("dog", (0, 0, 2, 2), 0.9)]) == []


def test_annotations_have_no_score_and_the_largest_counts():
    found = [Detection("dog", (0, 0, 10, 10)), Detection("dog", (50, 0, 80, 30)), Detection("tree", (0, 20, 40, 50))]
    assert chosen(found) == [("dog", (50, 0, 80, 30), "first sentence", 2)]
    assert [c[0] for c in chosen([*found, Detection("car", (0, 0, 60, 40))], [])] == ["car", "tree", "dog"]


def test_the_order_of_detections_does_not_matter():
    found = [
        Detection("dog", (0, 0, 20, 20), 0.5),
        Detection("dog", (40, 0, 60, 20), 0.5),
        Detection("x", (0, 0, 9, 9), 0.5),
    ]
    assert chosen(found) == chosen(found[::-1])
    assert chosen(found, []) == chosen(found[::-1], [])


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


def test_a_box_with_several_names_counts_under_each():
    found = annotated([{"x": 0, "y": 0, "w": 9, "h": 9, "names": ["man", "guy"]}], SIZE)
    assert [detection.label for detection in found] == ["man", "guy"]


def test_boxes_that_reach_out_a_little_are_clipped():
    assert annotated([{"label": "dog", "box": [-1.5, 0, 101, 51]}], SIZE)[0].box == (0, 0, 100, 50)
    assert annotated({"bbox": [], "category": []}, SIZE) == []


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("dog", "'dog', not a list"),
        ([["dog", 1, 2, 3, 4]], "not a list of boxes"),
        ({"bbox": [[0, 0, 9, 9]], "category": []}, "different lengths: [0, 1]"),
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


def matched(label, text):
    found = match([Detection(label, (0, 0, 9, 9))], [Candidate(text, "rest")])
    return [detection.label for detection in found] == [text] and label != text


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("dining table", "table"),
        ("dog", "small brown dog"),
        ("red square", "square"),
        ("person", "young man"),
        ("person", "girl"),
        ("cell phone", "smartphone"),
        ("wine glass", "wine glasses"),
        ("couch", "gray sofa"),
    ],
)
def test_labels_that_mean_a_candidate(label, text):
    assert matched(label, text)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("red square", "blue square"),
        ("woman", "man"),
        ("dining table", "coffee table"),
        ("table", "table cloth"),
        ("cat", "wildcat"),
        ("cat", "dog"),
    ],
)
def test_labels_that_do_not(label, text):
    assert not matched(label, text)


def test_the_same_name_comes_before_one_within_the_other():
    found = match(
        [Detection("dog", (0, 0, 9, 9)), Detection("brown dog", (9, 9, 20, 20)), Detection("tree", (0, 0, 5, 5))],
        [Candidate("brown dog", "question"), Candidate("dog", "rest"), Candidate("sky", "rest")],
    )
    assert found == [
        Detection("brown dog", (9, 9, 20, 20)),
        Detection("dog", (0, 0, 9, 9)),
        Detection("tree", (0, 0, 5, 5)),
    ]


def test_one_box_can_be_what_two_candidates_mean():
    found = match([Detection("dog", (0, 0, 9, 9))], [Candidate("brown dog", "question"), Candidate("dog", "rest")])
    assert [detection.label for detection in found] == ["brown dog", "dog"]
