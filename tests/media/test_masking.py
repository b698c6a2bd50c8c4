"""LPOI's masked images, pixel by pixel on small pictures."""

import math
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from trl_vpo.errors import RowError
from trl_vpo.media.load import Clip
from trl_vpo.media.masking import (
    blanked_clips,
    check_box,
    check_span,
    hidden_box,
    masked_clips,
    masked_image_list,
)

SIGNS = {(200, 200, 200): ".", (0, 0, 0): "#", (255, 0, 0): "R"}


def grey(width, height):
    return Image.new("RGB", (width, height), (200, 200, 200))


def drawn(image):
    return ["".join(SIGNS[tuple(pixel)] for pixel in row) for row in np.asarray(image).tolist()]


def hidden(image):
    return (np.asarray(image) == 0).all(axis=2)


def plain(size, box, n):
    return masked_image_list(grey(*size), box, n, visual_prompt=False)


def test_the_box_is_covered_step_by_step_from_the_left():
    items = masked_image_list(grey(8, 4).convert("L"), [1, 1, 5, 3], 3, visual_prompt=False)
    assert [drawn(item) for item in items] == [
        ["........", "........", "........", "........"],
        ["........", ".##.....", ".##.....", "........"],
        ["........", ".####...", ".####...", "........"],
    ]


@pytest.mark.parametrize(
    "size, box, half",
    [
        ((10, 10), [1, 3, 5, 7], (1, 3, 3, 7)),
        ((10, 10), [5, 3, 9, 7], (7, 3, 9, 7)),
        ((10, 10), [3, 1, 7, 5], (3, 1, 7, 3)),
        ((10, 10), [3, 5, 7, 9], (3, 7, 7, 9)),
        ((10, 10), [3, 3, 7, 7], (3, 3, 5, 7)),  # all four equal: left
        ((10, 12), [3, 2, 8, 10], (5, 2, 8, 10)),  # right, top and bottom equal: right
        ((12, 10), [3, 2, 9, 8], (3, 2, 9, 5)),  # top and bottom equal: top
    ],
)
def test_the_rectangle_grows_from_the_nearest_side(size, box, half):
    ys, xs = np.nonzero(hidden(plain(size, box, 3)[1]))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == half == hidden_box(box, size, 1, 3)
    assert len(xs) == (half[2] - half[0]) * (half[3] - half[1])


def test_hidden_pixels_are_counted_exactly_and_rounded_up():
    areas = [hidden(item) for item in plain((30, 20), [2, 3, 12, 10], 5)]
    assert [area.sum() for area in areas] == [0, 3 * 7, 5 * 7, 8 * 7, 10 * 7]  # 10 columns: 0, 2.5, 5, 7.5, 10
    assert all(larger[smaller].all() for smaller, larger in pairwise(areas))
    more_items_than_pixels = [hidden(item).sum() for item in plain((9, 9), [1, 3, 3, 6], 6)]
    assert more_items_than_pixels == [0, 3, 3, 6, 6, 6]


def test_the_last_item_hides_the_box_and_nothing_else():
    pixels = np.random.default_rng(0).integers(1, 255, (12, 16, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    items = masked_image_list(image, [3.9, 3.5, 8.1, 8.0], 4, visual_prompt=False)  # fractions are rounded outwards
    assert len(items) == 4
    assert (np.asarray(items[0]) == pixels).all() and items[0] is not image
    last = np.asarray(items[-1])
    inside = np.zeros((12, 16), bool)
    inside[3:8, 3:9] = True
    assert (last[inside] == 0).all() and (last[~inside] == pixels[~inside]).all()
    assert (np.asarray(image) == pixels).all()


def test_a_red_ellipse_goes_around_the_hidden_part():
    items = masked_image_list(grey(16, 12), [5, 4, 11, 8], 3)
    red = [(np.asarray(item) == (255, 0, 0)).all(axis=2) for item in items]
    assert not red[0].any() and red[1].any() and (red[1] != red[2]).any()  # each item has its own
    assert drawn(items[2]) == [
        "................",
        "................",
        "................",
        ".....RRRRRR.....",
        "....R######R....",
        "...R.######.R...",
        "...R.######.R...",
        "....R######R....",
        ".....RRRRRR.....",
        "................",
        "................",
        "................",
    ]


def test_the_ellipse_of_the_whole_image_stays_in_sight():
    last = np.asarray(masked_image_list(grey(40, 30), [0, 0, 40, 30], 2)[1])
    red = (last == (255, 0, 0)).all(axis=2)
    assert red[0].any() and red[-1].any() and red[:, 0].any() and red[:, -1].any()
    assert (last[~red] == 0).all()


@pytest.mark.parametrize("n", [1, 0, -1, 2.0, True, None])
def test_fewer_than_two_items_are_no_list(n):
    with pytest.raises(ValueError, match="at least 2 images"):
        masked_image_list(grey(10, 10), [1, 1, 5, 5], n)


BAD_BOXES = [
    ([1, 2, 3], "3 values instead of 4"),
    *[(box, "not a list of numbers") for box in (None, "1234", [1, 2, "x", 4], [1, 2, None, 4])],
    *[([1, 2, value, 4], "not finite") for value in (float("nan"), float("inf"))],
    *[(box, "is empty or inverted") for box in ([5, 2, 5, 6], [8, 2, 5, 6], [5, 6, 8, 2])],
    *[(box, "outside of the image") for box in ([-1, 2, 5, 6], [1, -0.5, 5, 6], [1, 2, 21, 6], [1, 2, 5, 10.5])],
    ([0.1, 0.2, 0.5, 1.0], "fractions"),
]


@pytest.mark.parametrize("box, reason", BAD_BOXES)
def test_a_bad_box_is_refused_with_box_size_and_remedy(box, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        masked_image_list(grey(20, 10), box, 3)
    message = str(caught.value)
    assert str(box) in message and "20x10" in message and "[x0, y0, x1, y1]" in message


@pytest.mark.parametrize("box", [[0, 0, 20, 10], (3, 4, 5, 6), np.array([0.5, 0.5, 19.5, 9.5]), [0, 0, 1, 1]])
def test_good_boxes_pass(box):
    check_box(box, (20, 10))


# --- clips --------------------------------------------------------------------------------------------------------


def white(count, size=(30, 40), step=0.5):
    """A white clip whose frames are `step` seconds apart; (height, width)."""
    frames = np.full((count, *size, 3), 255, np.uint8)
    return Clip(frames, np.arange(count) * step, 1 / step, count, count * step, "clip.mp4")


@pytest.mark.parametrize("prompt", [False, True])
def test_a_clip_of_the_stored_size_is_masked_frame_by_frame(prompt):
    clip = white(3)
    clip.frames[:] = np.random.default_rng(0).integers(0, 255, clip.frames.shape)
    got = masked_clips(clip, [5, 4, 31, 22], (40, 30), 4, visual_prompt=prompt)
    for t, frame in enumerate(clip.frames):
        items = masked_image_list(Image.fromarray(frame), [5, 4, 31, 22], 4, visual_prompt=prompt)
        assert all(np.array_equal(np.asarray(item), shown.frames[t]) for item, shown in zip(items, got))
    assert np.array_equal(got[0].frames, clip.frames) and got[2].timestamps is clip.timestamps


def test_the_box_of_a_clip_is_in_pixels_of_the_stored_frames():
    """Of frames that are stored at 80x60 and read at half of it, rounded outwards."""
    *_, last = masked_clips(white(2), [11, 8, 63, 45], (80, 60), 3, visual_prompt=False)
    want = np.full((30, 40), 255)
    want[4:23, 5:32] = 0
    assert np.array_equal(last.frames[1, ..., 0], want)
    tiny = masked_clips(white(1, (2, 2)), [0, 0, 1, 1], (100, 100), 2, visual_prompt=False)[-1]
    assert (tiny.frames[0, ..., 0] == [[0, 255], [255, 255]]).all()
    with pytest.raises(RowError, match=r"critical_box .* in an image of 80x60 pixels reaches outside"):
        masked_clips(white(1), [0, 0, 81, 60], (80, 60), 2)


def test_frames_of_a_span_go_dark_evenly_and_stay_dark():
    clip = white(10)
    got = blanked_clips(clip, [1, 4.5], 5)  # frames 2 to 9
    dark = [np.flatnonzero(~item.frames.any((1, 2, 3))).tolist() for item in got]
    assert dark == [[], [2, 6], [2, 4, 6, 8], [2, 3, 4, 6, 7, 8], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert all(set(np.unique(item.frames)) <= {0, 255} for item in got) and clip.frames.all()
    five = [int((~item.frames.any((1, 2, 3))).sum()) for item in blanked_clips(clip, [0, 2], 4)]
    assert five == [0, 2, 4, 5]  # ceil(k * 5 / 3)
    one = [int((~item.frames.any((1, 2, 3))).sum()) for item in blanked_clips(clip, [0.9, 1.1], 3)]
    assert one == [0, 1, 1]  # with more items than frames, neighbours are equal


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ([1], "is not .start, end. in seconds"),
        ([2, 1], "is not .start, end. in seconds"),
        ([-1, 1], "is not .start, end. in seconds"),
        ([0, math.nan], "is not .start, end. in seconds"),
        (["0", "1"], "is not .start, end. in seconds"),
        ([1, 5.5], "ends behind the video, which is 5.00 s long"),
        ([1.1, 1.4], "holds none of the 10 sampled frames, which are from 0.00 to 4.50 s. Raise num_frames"),
    ],
)
def test_spans_that_hide_nothing_are_named(span, says):
    with pytest.raises(RowError, match=rf"critical_span .* of clip.mp4 {says}"):
        check_span(span, white(10))
