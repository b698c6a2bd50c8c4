"""Outlines in the place of boxes: SAM 2 at tiny size, and the list drawn from a mask."""

import numpy as np
import pytest
from detector_models import save
from PIL import Image

from trl_vpo.generate.objects.segment import Segmenter, masked_by
from trl_vpo.media.masking import masked_image_list


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(1, 255, (40, 60, 3), dtype=np.uint8))


def disc(image, x, y, radius):
    rows, columns = np.mgrid[: image.height, : image.width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def test_masks_of_a_real_model(image, tmp_path):
    segmenter = Segmenter(save("sam2", tmp_path), device="cpu")
    boxes = [(10, 5, 50, 35), (0, 0, 60, 40), (20, 10, 40, 30)]
    masks = segmenter.masks([image] * 3, boxes)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        assert mask.shape == (40, 60) and mask.dtype == bool
        assert mask.any() and not mask[y0:y1, x0:x1].all()
        outside = mask.copy()
        outside[y0:y1, x0:x1] = False
        assert not outside.any()
    (alone,) = segmenter.masks([image], boxes[1:2])
    assert (alone == masks[1]).all()


def test_only_the_mask_turns_black_and_ever_more_of_it(image):
    mask = disc(image, 12, 20, 8)
    items = masked_by(image, mask, 5, visual_prompt=False)
    before = np.asarray(image)
    hidden = [(np.asarray(item) != before).any(-1) for item in items]
    assert [int(h.sum()) for h in hidden] == sorted({int(h.sum()) for h in hidden})  # strictly growing
    assert not hidden[0].any() and (hidden[-1] == mask).all()
    for k, h in enumerate(hidden):
        assert not (h & ~mask).any() and (np.asarray(items[k])[h] == 0).all()
        assert not h[:, 4 + -(-17 * k // 4) :].any()  # from the left, the nearest side: ceil(k / 4 of 17 columns)


def test_a_mask_that_fills_its_box_gives_the_list_of_the_box(image):
    mask = np.zeros((40, 60), bool)
    mask[10:30, 3:33] = True
    for prompt in (True, False):
        items = masked_by(image, mask, 4, visual_prompt=prompt)
        for ours, theirs in zip(items, masked_image_list(image, (3, 10, 33, 30), 4, visual_prompt=prompt)):
            assert (np.asarray(ours) == np.asarray(theirs)).all()


def test_the_ellipse_is_drawn_around_the_hidden_part(image):
    mask = disc(image, 30, 20, 9)
    with_prompt, without = (masked_by(image, mask, 3, visual_prompt=prompt) for prompt in (True, False))
    for k in (1, 2):
        changed = (np.asarray(with_prompt[k]) != np.asarray(without[k])).any(-1)
        assert changed.any() and (np.asarray(with_prompt[k])[changed] == (255, 0, 0)).all()
