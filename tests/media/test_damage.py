"""The damaged clip: what is drawn lies in the paper's ranges, and what is applied is the same on every frame."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from trl_vpo.media.corruptions import Damage, DamageSettings, apply_damage, damage, draw_damage
from trl_vpo.media.load import Clip, Media

SETTINGS = DamageSettings()
UNSHARP = 0.01  # a blur so narrow that it changes no pixel


def noise(count=16, height=56, width=56, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def clip(frames) -> Clip:
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
    media = Media((Image.fromarray(noise()[0]),), (clip(noise()),))
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
    given = Media((image,), (clip(frames), clip(frames)))
    copies = frames.copy(), image.copy()
    damaged = damage(given, np.random.default_rng(3), SETTINGS)
    assert np.array_equal(frames, copies[0]) and image.tobytes() == copies[1].tobytes()
    assert damaged.images[0].size == (70, 30) and damaged.images[0].mode == "RGB"
    for video in damaged.videos:
        assert video.frames.shape == (2, 56, 56, 3) and video.frames.dtype == np.uint8
        assert (video.total_frames, video.duration, video.source) == (16, 4.0, "clip.mp4")
    (alone,) = damage(Media(videos=(clip(frames),)), np.random.default_rng(3), SETTINGS).videos
    drawn = draw_damage(np.random.default_rng(3), 16, (56, 56), SETTINGS)
    assert alone.timestamps.tolist() == [number / 4 for number in drawn.frames]
    assert np.array_equal(alone.frames, apply_damage(frames, drawn))
    first, second = damaged.videos
    assert not np.array_equal(first.frames, second.frames)  # each clip has a damage of its own


def test_short_clips():
    media = Media(videos=tuple(clip(noise(count)) for count in (1, 2, 3)))
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
