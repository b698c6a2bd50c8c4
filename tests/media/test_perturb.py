"""RRPO's perturbations of clips and images: what is covered, what changes places, what stays."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from trl_vpo.errors import InputError
from trl_vpo.media.corruptions import FILL, MODES, PerturbSettings, effective_mode, mask_size, perturb
from trl_vpo.media.load import Clip, Media

SEEDS = range(30)
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def clip():
    """A clip of eight different frames, none of whose pixels is as bright as the mask."""
    frames = RNG.integers(0, 240, (8, 56, 56, 3), dtype=np.uint8)
    frames.flags.writeable = False  # perturb must not change what it is given
    return Clip(frames, np.arange(8) / 4, 4.0, 8, 2.0, "a.mp4")


@pytest.fixture(scope="module")
def scene():
    """An image, twice as wide as it is high."""
    return Image.fromarray(RNG.integers(0, 240, (56, 112, 3), dtype=np.uint8))


def perturbed(clip, seed, mode, **settings):
    return perturb(Media(videos=(clip,)), seed, PerturbSettings(mode, **settings)).videos[0]


def covered(frames):
    return (frames == np.array(FILL, np.uint8)).all(axis=-1)  # (T, H, W)


def order_of(before, after):
    """The position in `before` of each frame of `after`."""
    return [next(i for i, frame in enumerate(before) if (frame == other).all()) for other in after]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mask_is_one_grey_square_in_every_frame(clip, seed):
    masked = perturbed(clip, seed, "mask")
    hidden = covered(masked.frames)
    assert masked.frames.shape == clip.frames.shape and masked.frames.dtype == np.uint8
    assert (hidden == hidden[0]).all()
    ys, xs = np.nonzero(hidden[0])
    assert np.ptp(ys) == np.ptp(xs) and len(ys) == (np.ptp(ys) + 1) ** 2
    assert 0.25 <= hidden[0].mean() <= 0.5
    assert (masked.frames[~hidden] == clip.frames[~hidden]).all()


def test_masks_of_different_seeds_use_the_whole_range_and_frame(clip):
    masks = np.stack([covered(perturbed(clip, s, "mask").frames)[0] for s in SEEDS])
    shares = masks.mean(axis=(1, 2))
    assert shares.min() < 0.3 and shares.max() > 0.45
    assert masks.any(axis=0).mean() > 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_images_are_masked_in_every_mode_with_a_mask(scene, seed):
    media, modes = Media(images=(scene,)), [mode for mode in MODES if "mask" in mode]
    shown = [perturb(media, seed, PerturbSettings(mode)).images[0] for mode in modes]
    arrays = [np.asarray(image) for image in shown]
    assert all((array == arrays[0]).all() for array in arrays)  # one seed, one mask
    assert shown[0].size == scene.size and shown[0].mode == "RGB"
    assert 0.25 <= covered(arrays[0]).mean() <= 0.5


@pytest.mark.parametrize(
    "size, share, box",
    [
        ((100, 100), 0.36, (60, 60)),
        ((100, 200), 0.5, (100, 100)),  # the largest square of a 2:1 frame
        ((100, 400), 0.25, (100, 100)),
        ((100, 400), 0.5, (100, 200)),  # no square of that area fits: a rectangle keeps it
        ((400, 100), 0.5, (200, 100)),
        ((2, 2), 0.4, (1, 1)),
        ((1, 1), 0.4, (1, 1)),
    ],
)
def test_size_of_the_mask(size, share, box):
    assert mask_size(*size, share, (0.25, 0.5)) == box


@pytest.mark.parametrize("size", [(56, 56), (56, 112), (360, 640), (1080, 404), (37, 211), (7, 5)])
def test_no_rounding_leaves_the_range(size):
    for share in np.linspace(0.25, 0.5, 60):
        height, width = mask_size(*size, share, (0.25, 0.5))
        assert 0.25 <= height * width / (size[0] * size[1]) <= 0.5
        assert height == width or min(size) in (height, width)


@pytest.mark.parametrize(
    ("count", "mode", "window", "windows"),
    [
        (8, "local", 4, [(0, 4), (4, 8)]),
        (7, "local", 3, [(0, 3), (3, 7)]),  # a last window of one frame joins the one before
        (8, "global", 4, [(0, 8)]),
    ],
)
def test_shuffling_moves_every_frame_within_its_window(clip, count, mode, window, windows):
    part, orders = replace(clip, frames=clip.frames[:count], timestamps=clip.timestamps[:count]), set()
    for seed in SEEDS:
        shuffled = perturbed(part, seed, mode, window=window)
        order = order_of(part.frames, shuffled.frames)
        assert all(sorted(order[start:end]) == list(range(start, end)) for start, end in windows)
        assert all(i != place for place, i in enumerate(order))
        assert (shuffled.timestamps == part.timestamps).all()
        orders.add(tuple(order))
    assert len(orders) > 5
    assert max(abs(i - place) for order in orders for place, i in enumerate(order)) > (5 if mode == "global" else 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_with_different_frames_looks_different(clip, seed):
    pattern = clip.frames[[0, 1, 0, 1]]  # most permutations that move every frame change nothing here
    assert (perturbed(replace(clip, frames=pattern), seed, "local").frames != pattern).any()


def test_masking_with_shuffling_is_both(clip):
    both, mask, shuffled = (perturbed(clip, 5, mode) for mode in ("mask+local", "mask", "local"))
    hidden = covered(mask.frames)
    assert (covered(both.frames) == hidden).all()
    assert (both.frames[~hidden] == shuffled.frames[~hidden]).all()


def test_the_seed_decides_and_nothing_else(clip, scene):
    media = Media((scene, scene), (clip, clip))
    settings = PerturbSettings("mask+global")
    first, second, other = (perturb(media, seed, settings) for seed in (2**62, 2**62, 1))
    for one, two in zip(first.videos, second.videos):
        assert (one.frames == two.frames).all()
    assert (first.videos[0].frames != other.videos[0].frames).any()
    assert (first.videos[0].frames != first.videos[1].frames).any()  # each has a mask of its own
    assert (np.asarray(first.images[0]) != np.asarray(first.images[1])).any()


def test_what_cannot_be_shuffled(clip, scene):
    one = replace(clip, frames=clip.frames[:1], timestamps=clip.timestamps[:1])
    still = replace(clip, frames=clip.frames[[2] * 8])
    blocks = replace(clip, frames=clip.frames[[0] * 4 + [1] * 4])  # within windows of four, nothing changes
    for media in (Media(images=(scene,)), Media(videos=(one,)), Media(videos=(still,)), Media(videos=(blocks,))):
        assert effective_mode(media, PerturbSettings("mask+local")) == "mask"
        with pytest.raises(InputError, match=r"local shuffling changes nothing.*Use a perturbation with mask"):
            perturb(media, 0, PerturbSettings("local"))
    assert effective_mode(Media(videos=(blocks,)), PerturbSettings("mask+global")) == "mask+global"
    assert effective_mode(Media((scene,), (still, clip)), PerturbSettings("local")) == "local"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "shuffle"}, "perturbation is 'shuffle'"),
        *[({"area": area}, "masked area") for area in ((0.5, 0.25), (0.0, 0.5), (0.5, 1.0))],
        ({"window": 1}, "shuffle_window is 1"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        PerturbSettings(**change)
