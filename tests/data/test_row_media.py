"""The media that a row is compared on: which columns each form reads, and how broken ones are refused."""

import numpy as np
import pytest
from helpers import message, row

from trl_vpo.data.rows import read_row
from trl_vpo.errors import RowError

IMAGE, VIDEO = row("image", ["a.png"]), row("video", ["a.mp4"])
ONE_ANSWER = {"rejected": None}


def lists(read):
    return read.media_list


def test_rejected_media_stand_beside_the_rows_own():
    read = read_row(IMAGE | {"rejected_images": ["b.png"]}, media_form="pair")
    assert lists(read) == [(["a.png"], []), (["b.png"], [])] and read.rejected != read.chosen
    read = read_row(VIDEO | {"rejected_videos": np.array(["b.mp4"])}, media_form="pair")
    assert lists(read) == [([], ["a.mp4"]), ([], ["b.mp4"])]
    both = row("image", ["a.png"]) | {"videos": ["a.mp4"], "prompt": message("user", "<image>", "<video>", "What?")}
    read = read_row(both | {"rejected_videos": ["b.mp4"], "rejected_images": []}, media_form="pair")
    assert lists(read) == [(["a.png"], ["a.mp4"]), (["a.png"], ["b.mp4"])]  # what is not given is the row's own
    assert lists(read_row(IMAGE | {"rejected_images": None}, media_form="pair")) is None
    assert lists(read_row(IMAGE | {"rejected_images": [{"path": "a.png"}], "images": [{"path": "a.png"}]},
                          media_form="pair")) is None  # the same media: an ordinary pair  # fmt: skip


def test_a_contrast_of_media_may_have_one_response():
    for more in (ONE_ANSWER, {"rejected": IMAGE["chosen"]}):
        read = read_row(IMAGE | more | {"rejected_images": ["b.png"]}, media_form="pair")
        assert read.rejected == read.chosen
        read = read_row(IMAGE | more, media_form="pair", drawn=True)
        assert read.rejected == read.chosen and lists(read) is None
    strings = {"prompt": "<image> What?", "chosen": "A", "images": ["a"], "rejected_images": ["b"]}
    assert read_row(strings, media_form="pair").rejected == "A"


def test_rows_of_mdpo():
    """One or more images and videos, with or without a second of each; a box is not read."""
    boxed = read_row(IMAGE | {"critical_box": [0, 0, 1, 1]}, media_form="contrast")
    assert (boxed.images, boxed.critical_box, lists(boxed)) == (["a.png"], None, None)
    listed = read_row(IMAGE | {"image_list": ["a.png", "b.png"]}, media_form="contrast")
    assert lists(listed) == [(["a.png"], []), (["b.png"], [])]
    two = read_row(row("image", ["a", "b"], rejected_images=["c", "d"]), media_form="contrast")
    assert lists(two) == [(["a", "b"], []), (["c", "d"], [])]
    assert lists(read_row(VIDEO, media_form="contrast")) is None


def test_lists_and_spans_of_a_video():
    listed = read_row(row("video", [], video_list=["a.mp4", "b.mp4"], prompt=VIDEO["prompt"]), media_form="ranking")
    assert listed.videos == ["a.mp4"] and lists(listed) == [([], ["a.mp4"]), ([], ["b.mp4"])]
    span = read_row(VIDEO | {"critical_span": [1, 2.5]}, media_form="ranking")
    assert (span.critical_span, span.critical_box) == ([1, 2.5], None)
    box = read_row(VIDEO | {"critical_box": [0, 0, 9, 9], "critical_span": None}, media_form="ranking")
    assert (box.critical_span, box.critical_box) == (None, [0, 0, 9, 9])


def test_rows_of_symmpo():
    example = IMAGE | {"other_images": ["b.png"], "other_chosen": message("assistant", "a dog.")}
    read = read_row(example, media_form="symmetric")
    assert lists(read) == [(["a.png"], []), (["b.png"], [])] and read.sides == ("chosen", "rejected", "other_chosen")
    assert read.other_chosen == [{"role": "assistant", "content": [{"type": "text", "text": "a dog."}]}]
    assert read_row(example).sides == ("chosen", "rejected")  # other methods train on the pair


BROKEN = [
    (None, IMAGE | {"rejected_images": ["b.png"]}, "only DPO and mDPO read"),
    (None, VIDEO | {"rejected_videos": ["b.mp4"]} | ONE_ANSWER, "only DPO and mDPO read"),
    ("ranking", IMAGE | {"rejected_images": ["b.png"]}, "only DPO and mDPO read"),
    ("pair", IMAGE | {"rejected_images": "b.png"}, "`rejected_images` must be a list, got str"),
    ("pair", IMAGE | {"rejected_images": 3}, "`rejected_images` must be a list, got int"),
    ("pair", IMAGE | {"rejected_images": ["b.png", None]}, r"nothing at position \[1\]"),
    ("pair", IMAGE | {"rejected_images": ["b", "c"]}, r"has 2 item\(s\), but the row has 1 image"),
    ("pair", IMAGE | {"rejected_videos": ["b.mp4"]}, r"`rejected_videos` has 1 item\(s\), but the row has 0 video"),
    ("pair", row(None) | {"rejected_images": ["b.png"]}, r"has 1 item\(s\), but the row has 0 image"),
    ("pair", IMAGE | {"rejected_image": "b.png"}, "Did you mean `rejected_images`"),
    ("pair", IMAGE | ONE_ANSWER, "has no `rejected`"),
    ("pair", IMAGE | ONE_ANSWER | {"rejected_images": ["a.png"]}, "are identical .*, and so are their media"),
    ("pair", IMAGE | ONE_ANSWER | {"rejected_images": ["b.png"], "prompt": None}, "neither `prompt` nor `rejected`"),
    ("contrast", IMAGE | ONE_ANSWER | {"rejected_images": ["b.png"]}, "has no `rejected`"),
    ("contrast", row(None), "mDPO needs an image or a video"),
    ("contrast", IMAGE | {"image_list": ["a.png", "b", "c"]}, "has 3 items; mDPO compares two"),
    ("ranking", VIDEO, "needs a `critical_box`.*`critical_span`"),
    ("ranking", IMAGE | {"critical_span": [0, 1]}, "`critical_span`, the seconds of a video, but an image"),
    ("ranking", VIDEO | {"critical_span": [0, 1], "critical_box": [0, 0, 1, 1]}, "and a `critical_span`; one of them"),
    ("ranking", VIDEO | {"critical_span": 3}, "`critical_span` must be a list, got int"),
    ("ranking", row("video", ["a", "b"], critical_span=[0, 1]), "the row has 0 and 2"),
    ("ranking", VIDEO | {"video_list": ["a.mp4"]}, r"1 video\(s\); a ranking needs at least two"),
    ("ranking", VIDEO | {"video_list": ["b.mp4", "c.mp4"]}, "beside its `video_list`"),
    ("ranking", VIDEO | {"video_list": ["a.mp4", "b"], "image_list": ["a", "b"]}, "`image_list` and `video_list`"),
    ("ranking", IMAGE | {"video_list": ["a.mp4", "b"]}, "does not belong|placeholder"),
    ("symmetric", IMAGE, "has no `other_chosen`"),
    ("symmetric", IMAGE | {"other_chosen": IMAGE["rejected"]}, "needs the other media of the pair"),
    ("symmetric", IMAGE | {"other_chosen": IMAGE["rejected"], "other_images": IMAGE["images"]}, "are its own media"),
    ("symmetric", IMAGE | {"other_chosen": IMAGE["chosen"], "other_images": ["b"]}, "chosen and other_chosen are id"),
    ("symmetric", IMAGE | {"other_chosen": message("assistant", " "), "other_images": ["b"]}, "other_chosen .* empty"),
    ("symmetric", IMAGE | {"other_chosen": message("user", "x"), "other_images": ["b"]}, "is not the assistant's"),
    ("symmetric", IMAGE | {"other_chosen": "x", "other_images": ["b"]}, "mixes strings and message lists"),
]


@pytest.mark.parametrize(("form", "example", "says"), BROKEN, ids=[f"{form} {says[:40]}" for form, _, says in BROKEN])
def test_broken_media_are_refused_by_name(form, example, says):
    with pytest.raises(RowError, match=says) as caught:
        read_row(example | {"_row_index": 3, "id": "x9"}, media_form=form)
    assert str(caught.value).startswith("row 3 (id 'x9'): ")
