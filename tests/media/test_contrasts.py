"""Contrasts: what becomes of images and clips that a response is compared on."""

import numpy as np
import pytest
from PIL import Image

from trl_vpo.errors import RowError
from trl_vpo.media.corruptions import FILL, TIMED, corrupted
from trl_vpo.media.load import Clip, Media


def test_mdpos_crop_shows_a_small_part_of_the_image():
    """Pixels that say where they lie: the crop's corners give its area, which is drawn anew by each seed."""
    y, x = np.mgrid[:200, :240]
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    random_crop = lambda seed: corrupted(Media((image,)), "crop", seed).images[0]  # noqa: E731
    areas = []
    for seed in range(200):
        crop = random_crop(seed)
        assert crop.size == image.size
        left, top, _ = np.asarray(crop)[0, 0].astype(int)
        right, bottom, _ = np.asarray(crop)[-1, -1].astype(int)
        areas.append((right - left + 1) * (bottom - top + 1) / (200 * 240))
    assert 0.005 < min(areas) < 0.03 and 0.17 < max(areas) < 0.22
    assert np.array_equal(random_crop(3), random_crop(3))


def numbered(count, size=(40, 60)):
    """A clip whose frame k shows 10 * k and, in the other channels, where its pixels lie."""
    y, x = np.mgrid[: size[0], : size[1]]
    frames = np.stack([np.stack([0 * x + 10 * k, x, y], -1) for k in range(count)]).astype(np.uint8)
    return Clip(frames, np.arange(count) / 2, 2.0, count, count / 2, "clip.mp4")


def test_a_crop_of_several_media():
    """Each image has a crop of its own, a clip one for all its frames; the first is what it is alone."""
    image, clip = Image.fromarray(numbered(1).frames[0]), numbered(5)
    got = corrupted(Media((image, image), (clip,)), "crop", 3)
    assert got.images[0] == corrupted(Media((image,)), "crop", 3).images[0] != got.images[1]
    (cropped,) = got.videos
    assert cropped.frames.shape == clip.frames.shape and np.array_equal(cropped.timestamps, clip.timestamps)
    assert all(np.array_equal(frame[..., 1:], cropped.frames[0][..., 1:]) for frame in cropped.frames)
    assert cropped.frames[..., 0].mean((1, 2)).round().tolist() == [0, 10, 20, 30, 40]
    assert np.ptp(cropped.frames[0, ..., 1].astype(int)) < 40


def test_contrasts_of_time():
    clip = numbered(9)
    shown = lambda name, seed=1: corrupted(Media((), (clip,)), name, seed).videos[0]  # noqa: E731
    numbers = lambda clip: (clip.frames[:, 0, 0, 0] // 10).tolist()  # noqa: E731
    assert numbers(shown("reverse")) == list(range(9))[::-1]
    shuffled = numbers(shown("shuffle"))
    assert sorted(shuffled) == list(range(9)) and all(k != place for place, k in enumerate(shuffled))
    assert shuffled == numbers(shown("shuffle")) != numbers(shown("shuffle", 2))
    dropped = shown("drop")
    assert len(numbers(dropped)) == 2 and dropped.timestamps.tolist() == [k / 2 for k in sorted(numbers(dropped))]
    for name in ("reverse", "shuffle"):
        assert np.array_equal(shown(name).timestamps, clip.timestamps)


def test_blank_and_masked_contrasts():
    media = Media((Image.fromarray(numbered(1).frames[0] + 9),), (numbered(3),))
    blank = corrupted(media, "blank", 1)
    assert not np.asarray(blank.images[0]).any() and not blank.videos[0].frames.any()
    masked = corrupted(media, "mask", 1)
    for got in (np.asarray(masked.images[0])[None], masked.videos[0].frames):
        assert 0.2 < (got == FILL).all(-1).mean() < 0.55
    assert np.array_equal(numbered(3).frames, media.videos[0].frames)  # the rows own media are untouched


@pytest.mark.parametrize("name", TIMED)
def test_contrasts_of_time_refuse_what_has_none(name):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(RowError, match=f"'{name}' .* an image, which has no time. Take crop, mask or blank"):
        corrupted(Media((image,), (numbered(9),)), name, 1)
    short = 2 if name == "drop" else 1
    with pytest.raises(RowError, match=f"at least {short + 1} frames, and clip.mp4 is sampled at {short}"):
        corrupted(Media((), (numbered(short),)), name, 1)
