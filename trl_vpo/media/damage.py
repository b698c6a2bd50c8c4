"""LeanPO's damaged clip, on which the losing response is made (arXiv 2506.05260).

Few of the frames are left, and one random-resized crop, colour jitter, greyscale, Gaussian blur and horizontal flip
are the same for all of them. Every parameter is drawn ahead (:func:`draw_damage`), so the damage of a row is known and
repeatable, and applied by torchvision's functional transforms.

The flip is the paper's. It exchanges left and right, so for a question about directions the losing response may be
wrong for no other reason; `flip_p=0` leaves it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from trl_vpo.media.load import Clip, Media


@dataclass(frozen=True)
class DamageSettings:
    """The ranges that damage is drawn from; the defaults are the paper's.

    Attributes:
        num_frames: frames left of a clip; all of a shorter one.
        area: share of the frame that the crop keeps.
        ratio: width / height of the crop, drawn evenly in its logarithm. In a frame too narrow for it, the crop is
            cut to the frame.
        brightness, contrast, saturation: factors are drawn from 1 - value to 1 + value.
        hue: shift, drawn from -value to value in turns of the colour circle.
        jitter_p, grey_p, flip_p: how often there is colour jitter, greyscale, a flip.
        blur_sigma: pixels of the frame's own size; there always is blur, as no probability is given for it.
    """

    num_frames: int = 2
    area: tuple[float, float] = (0.08, 0.30)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5


@dataclass(frozen=True)
class Damage:
    """The damage of one clip or image.

    Attributes:
        frames: positions of the frames that are left, ascending.
        crop: (top, left, height, width) in pixels; scaled back to the size of the frame.
        jitter: (name, factor) of brightness, contrast, saturation and hue in the order they are applied; or empty.
        grey, flip: whether there is greyscale, a horizontal flip.
        sigma: of the blur, in pixels.
    """

    frames: tuple[int, ...]
    crop: tuple[int, int, int, int]
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    sigma: float
    flip: bool


def damage(media: Media, rng: np.random.Generator, settings: DamageSettings) -> Media:
    """Damaged copies of all clips and images, each with a damage of its own. The given media stay as they are.

    Sizes stay, and the frames that are left keep their timestamps. A clip may be left with a single frame.
    """
    images, videos = [], []
    for image in media.images:
        frames = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
        drawn = draw_damage(rng, 1, frames.shape[1:3], settings)
        images.append(Image.fromarray(apply_damage(frames, drawn)[0]))
    for clip in media.videos:
        drawn = draw_damage(rng, len(clip.frames), clip.frames.shape[1:3], settings)
        videos.append(_damaged_clip(clip, drawn))
    return Media(tuple(images), tuple(videos))


def draw_damage(rng: np.random.Generator, num_frames: int, size: tuple[int, int], settings: DamageSettings) -> Damage:
    """Draw the damage of a clip of `num_frames` frames of `size` (height, width)."""
    left = rng.choice(num_frames, size=min(num_frames, settings.num_frames), replace=False)
    crop = _draw_crop(rng, size, settings)
    jitter = [
        ("brightness", rng.uniform(1 - settings.brightness, 1 + settings.brightness)),
        ("contrast", rng.uniform(1 - settings.contrast, 1 + settings.contrast)),
        ("saturation", rng.uniform(1 - settings.saturation, 1 + settings.saturation)),
        ("hue", rng.uniform(-settings.hue, settings.hue)),
    ]
    order = rng.permutation(len(jitter))
    return Damage(
        frames=tuple(sorted(left.tolist())),
        crop=crop,
        jitter=tuple(jitter[i] for i in order) if rng.random() < settings.jitter_p else (),
        grey=bool(rng.random() < settings.grey_p),
        sigma=rng.uniform(*settings.blur_sigma),
        flip=bool(rng.random() < settings.flip_p),
    )


def _draw_crop(rng: np.random.Generator, size: tuple[int, int], settings: DamageSettings) -> tuple[int, int, int, int]:
    height, width = size
    area = rng.uniform(*settings.area) * height * width
    ratio = math.exp(rng.uniform(*(math.log(value) for value in settings.ratio)))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def apply_damage(frames: np.ndarray, drawn: Damage) -> np.ndarray:
    """The frames that `drawn` leaves of (T, H, W, 3) uint8, damaged: (len(drawn.frames), H, W, 3) uint8."""
    import torch
    from torchvision.transforms.v2 import functional as F

    adjust = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }
    height, width = frames.shape[1:3]
    picked = torch.from_numpy(frames[list(drawn.frames)]).permute(0, 3, 1, 2)  # (T, 3, H, W); indexing has copied
    picked = F.resized_crop(picked, *drawn.crop, size=[height, width], antialias=True)
    for name, factor in drawn.jitter:
        picked = adjust[name](picked, factor)
    if drawn.grey:
        picked = F.rgb_to_grayscale(picked, num_output_channels=3)
    # three sigma on each side hold 99.7 % of the kernel; the mirrored border must be shorter than the frame
    reach = min(math.ceil(3 * drawn.sigma), height - 1, width - 1)
    picked = F.gaussian_blur(picked, kernel_size=[2 * reach + 1] * 2, sigma=[drawn.sigma] * 2)
    if drawn.flip:
        picked = F.horizontal_flip(picked)
    return picked.permute(0, 2, 3, 1).contiguous().numpy()


def _damaged_clip(clip: Clip, drawn: Damage) -> Clip:
    return replace(clip, frames=apply_damage(clip.frames, drawn), timestamps=clip.timestamps[list(drawn.frames)])
