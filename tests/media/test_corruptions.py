"""Damage and perturbation: draws lie in the papers' ranges; what is covered, what changes places, what stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from trl_vpo.errors import InputError
from trl_vpo.media.corruptions import (
    FILL,
    MODES,
    Damage,
    DamageSettings,
    PerturbSettings,
    apply_damage,
    damage,
    draw_damage,
    effective_mode,
    mask_size,
    perturb,
)
from trl_vpo.media.load import Clip, Media

SETTINGS = DamageSettings()
UNSHARP = 0.01  # a blur so narrow that it changes no pixel


def noise(count=16, height=56, width=56, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def clip_of(frames) -> Clip:
    count = len(frames)
    return Clip(frames, np.arange(count) / 4, fps=4.0, total_frames=count, duration=count / 4, source="clip.mp4")


def plain(frames, /, **changes) -> Damage:
    """No damage but what `changes` say."""
    count, height, width = frames.shape[:3]
    return replace(Damage(tuple(range(count)), (0, 0, height, width), (), False, UNSHARP, False), **changes)


def test_draws_lie_in_the_ranges_of_the_paper_and_fill_them():
    rng = np.random.default_rng(0)
    height, width = 480, 640
    drawn = [draw_damage(rng, 16, (height, width), SETTINGS) for _ in range(2000)]
    tops, lefts, heights, widths = np.array([d.crop for d in drawn]).T
    areas, ratios = heights * widths / (height * width), widths / heights
    assert 0.079 < areas.min() < 0.09 and 0.29 < areas.max() < 0.301
    assert 0.745 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.342
    assert np.median(ratios) == pytest.approx(1.0, abs=0.03)  # even in the logarithm
    assert tops.min() == lefts.min() == 0
    assert (tops + heights).max() == height and (lefts + widths).max() == width
    assert {len(set(d.frames)) for d in drawn} == {2}
    assert all(d.frames == tuple(sorted(d.frames)) for d in drawn)
    assert {frame for d in drawn for frame in d.frames} == set(range(16))
    jittered = [d.jitter for d in drawn if d.jitter]
    shares = [len(jittered) / 2000, np.mean([d.grey for d in drawn]), np.mean([d.flip for d in drawn])]
    assert shares == pytest.approx([0.8, 0.2, 0.5], abs=0.04)
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        factors = [dict(jitter)[name] for jitter in jittered]
        assert low <= min(factors) < low + 0.01 and high - 0.01 < max(factors) <= high
    assert len({tuple(name for name, _ in jitter) for jitter in jittered}) == 24  # every order
    sigmas = [d.sigma for d in drawn]
    assert 0.1 <= min(sigmas) < 0.11 and 1.99 < max(sigmas) <= 2.0


def test_a_seed_fixes_the_damage_and_nothing_else_does():
    media = Media((Image.fromarray(noise()[0]),), (clip_of(noise()),))
    runs = []
    for seed, torch_seed in ((5, 0), (5, 1), (6, 1)):
        torch.manual_seed(torch_seed)
        before = torch.random.get_rng_state()
        damaged = damage(media, np.random.default_rng(seed), SETTINGS)
        assert torch.equal(torch.random.get_rng_state(), before)
        runs.append((np.asarray(damaged.images[0]), damaged.videos[0].frames))
    for first, second, other in zip(*runs):
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)


def test_all_frames_of_a_clip_get_the_same_damage():
    still = np.repeat(noise(1), 16, axis=0)
    moving = noise(16)
    rng = np.random.default_rng(1)
    for _ in range(20):
        drawn = replace(draw_damage(rng, 16, (56, 56), SETTINGS), frames=(1, 4, 9))
        assert (np.ptp(apply_damage(still, drawn), axis=0) == 0).all()
        alone = [apply_damage(moving[i : i + 1], replace(drawn, frames=(0,)))[0] for i in drawn.frames]
        assert np.array_equal(apply_damage(moving, drawn), np.stack(alone))


def test_each_part_of_the_damage_does_what_it_says():
    frames = noise(3, 40, 60)
    assert np.array_equal(apply_damage(frames, plain(frames)), frames)
    assert np.array_equal(apply_damage(frames, plain(frames, frames=(0, 2))), frames[[0, 2]])
    assert np.array_equal(apply_damage(frames, plain(frames, flip=True)), frames[:, :, ::-1])
    grey = apply_damage(frames, plain(frames, grey=True))
    assert (np.ptp(grey, axis=-1) == 0).all()
    assert np.abs(grey[..., 0] - frames @ np.array([0.299, 0.587, 0.114])).max() <= 1.5
    assert np.ptp(apply_damage(frames[:1], plain(frames[:1], jitter=(("contrast", 0.0),)))) <= 1
    assert np.ptp(apply_damage(frames, plain(frames, jitter=(("saturation", 0.0),))), axis=-1).max() <= 1
    red = np.zeros((1, 20, 20, 3), np.uint8)
    red[..., 0] = 200
    assert (apply_damage(red, plain(red, jitter=(("hue", 1 / 3),))) == [0, 200, 0]).all()
    flat = np.full((1, 20, 20, 3), 100, np.uint8)
    for factors, value in (((3.0, 0.5), 127), ((0.5, 3.0), 150)):  # in order: the first is clipped at 255 in between
        jitter = tuple(("brightness", factor) for factor in factors)
        assert (apply_damage(flat, plain(flat, jitter=jitter)) == value).all()


def test_a_crop_shows_its_part_at_the_size_of_the_frame():
    frames = np.zeros((1, 40, 80, 3), np.uint8)
    frames[:, :20, 40:] = (200, 0, 0)  # top right
    frames[:, 20:, :40] = (0, 0, 200)  # bottom left
    red = apply_damage(frames, plain(frames, crop=(0, 40, 20, 40)))
    blue = apply_damage(frames, plain(frames, crop=(25, 10, 10, 20)))
    assert red.shape == blue.shape == frames.shape
    assert (red == (200, 0, 0)).all() and (blue == (0, 0, 200)).all()


def test_blur_spreads_a_point_by_sigma():
    frames = np.zeros((1, 41, 41, 3), np.uint8)
    frames[:, 20, 20] = 255
    weights = apply_damage(frames, plain(frames, sigma=1.5))[0, :, :, 0].astype(float)
    rows = np.arange(41) - 20
    assert weights.sum() == pytest.approx(255, rel=0.1)
    assert (weights.sum(1) * rows**2).sum() / weights.sum() == pytest.approx(1.5**2, rel=0.15)


def test_the_media_given_stay_and_what_is_left_keeps_its_times():
    frames = noise(16)
    image = Image.fromarray(noise(1, 30, 70)[0]).convert("RGBA")
    given = Media((image,), (clip_of(frames), clip_of(frames)))
    copies = frames.copy(), image.copy()
    damaged = damage(given, np.random.default_rng(3), SETTINGS)
    assert np.array_equal(frames, copies[0]) and image.tobytes() == copies[1].tobytes()
    assert damaged.images[0].size == (70, 30) and damaged.images[0].mode == "RGB"
    for video in damaged.videos:
        assert video.frames.shape == (2, 56, 56, 3) and video.frames.dtype == np.uint8
        assert (video.total_frames, video.duration, video.source) == (16, 4.0, "clip.mp4")
    (alone,) = damage(Media(videos=(clip_of(frames),)), np.random.default_rng(3), SETTINGS).videos
    drawn = draw_damage(np.random.default_rng(3), 16, (56, 56), SETTINGS)
    assert alone.timestamps.tolist() == [number / 4 for number in drawn.frames]
    assert np.array_equal(alone.frames, apply_damage(frames, drawn))
    first, second = damaged.videos
    assert not np.array_equal(first.frames, second.frames)  # each clip has a damage of its own


def test_short_clips():
    media = Media(videos=tuple(clip_of(noise(count)) for count in (1, 2, 3)))
    damaged = damage(media, np.random.default_rng(0), SETTINGS).videos
    assert [(len(video.frames), len(video.timestamps)) for video in damaged] == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize("size", [(56, 56), (1, 1), (2, 7), (8, 300), (300, 8)])
def test_tiny_and_narrow_frames(size):
    rng = np.random.default_rng(0)
    frames = noise(2, *size)
    for _ in range(30):
        drawn = draw_damage(rng, 2, size, SETTINGS)
        top, left, height, width = drawn.crop
        assert 0 <= top <= size[0] - height < size[0] and 0 <= left <= size[1] - width < size[1]
        assert apply_damage(frames, drawn).shape == frames.shape


# --- perturbation -----------------------------------------------------------------------------------------------

SEEDS = range(30)
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def clip():
    """A clip of eight different frames, none of whose pixels is as bright as the mask."""
    frames = RNG.integers(0, 240, (8, 56, 56, 3), dtype=np.uint8)
    frames.flags.writeable = False  # perturb must not change what it is given
    return clip_of(frames)


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
