"""RRPO's perturbed media, on which the model is asked so that it makes mistakes (arXiv 2504.12083, section 3.1).

Spatial masking: one square, at the same place in every frame of a clip, covers 25-50 % of the area with a light grey.
Temporal shuffling: the frames change places within short windows ("local") or over the whole clip ("global"). The
timestamps stay, so the model is told nothing about it. The paper found masking with local shuffling to work best.

The paper gives neither the windows of local shuffling nor the kind of permutation: both are ours, see `_shuffled`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from trl_vpo.errors import InputError
from trl_vpo.media.load import Clip, Media

FILL = (245, 245, 245)
MODES = ("mask+local", "mask+global", "mask", "local", "global")


@dataclass(frozen=True)
class PerturbSettings:
    """How media are perturbed; the defaults are the paper's, apart from the window.

    Attributes:
        mode: one of `MODES`.
        area: smallest and largest share of the frame that is masked.
        window: frames that change places with each other in local shuffling.
    """

    mode: str = "mask+local"
    area: tuple[float, float] = (0.25, 0.5)
    window: int = 4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"perturbation is {self.mode!r}: one of {', '.join(MODES)}.")
        if not 0 < self.area[0] <= self.area[1] < 1:
            raise ValueError(f"the masked area is {self.area}: give two shares above 0 and below 1, in order.")
        if self.window < 2:
            raise ValueError(f"shuffle_window is {self.window}: give at least 2 frames.")


def perturb(media: Media, seed: int, settings: PerturbSettings) -> Media:
    """Perturbed copies of all images and clips; sizes, frame counts and timestamps stay.

    Each image and each clip has a mask of its own. The same seed draws the same masks in every mode with masks.

    Raises:
        InputError: nothing can be perturbed in this mode, see `effective_mode`.
    """
    parts = effective_mode(media, settings).split("+")
    masks, orders = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    images, videos = list(media.images), [clip.frames for clip in media.videos]
    if "mask" in parts:
        pictures = (np.asarray(image.convert("RGB"))[None] for image in images)  # (1, H, W, 3) each
        images = [Image.fromarray(masked(picture, masks, settings.area)[0]) for picture in pictures]
        videos = [masked(frames, masks, settings.area) for frames in videos]
    if parts[-1] != "mask":
        videos = [frames[_shuffled(_windows(len(frames), settings), orders)] for frames in videos]
    return Media(tuple(images), tuple(replace(clip, frames=f) for clip, f in zip(media.videos, videos)))


def effective_mode(media: Media, settings: PerturbSettings) -> str:
    """What of the mode these media allow: images, single frames and clips that stand still cannot be shuffled.

    Raises:
        InputError: the mode only shuffles, and there is nothing to shuffle.
    """
    if settings.mode == "mask" or any(_moves(clip, settings) for clip in media.videos):
        return settings.mode
    if settings.mode.startswith("mask"):
        return "mask"
    raise InputError(
        f"{settings.mode} shuffling changes nothing: the row has {len(media.images)} image(s) and "
        f"{len(media.videos)} clip(s), none with different frames to exchange. Use a perturbation with mask."
    )


def _moves(clip: Clip, settings: PerturbSettings) -> bool:
    windows = _windows(len(clip.frames), settings)
    return any((clip.frames[start + 1 : end] != clip.frames[start]).any() for start, end in windows)


# --- masking ----------------------------------------------------------------------------------------------------


def masked(frames: np.ndarray, rng: np.random.Generator, area: tuple[float, float]) -> np.ndarray:
    """A copy of (T, H, W, 3) uint8 frames with one box, the same in all of them, filled with `FILL`."""
    height, width = frames.shape[1:3]
    box_height, box_width = mask_size(height, width, rng.uniform(*area), area)
    top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
    frames = frames.copy()
    frames[:, top : top + box_height, left : left + box_width] = FILL
    return frames


def mask_size(height: int, width: int, share: float, area: tuple[float, float]) -> tuple[int, int]:
    """(height, width) in pixels of the box that covers about `share` of a frame.

    A square where it fits. Where its side would be longer than the short side of the frame (with half of the area
    masked: from an aspect of 2:1 on), the area is kept: the box is as high (or wide) as the frame, and as much wider
    as it takes. Whole pixels are chosen so that the covered share lies within `area`; only in a frame of a few pixels
    there may be no such number, and then the box is the next smaller one, of at least one pixel.
    """
    short, long = sorted((height, width))
    side = math.sqrt(share * short * long)
    if side <= short:
        low, high = (math.sqrt(limit * short * long) for limit in area)
        size = _whole(side, low, high)
        return size, size
    length = _whole(share * long, area[0] * long, area[1] * long)
    return (short, length) if height <= width else (length, short)


def _whole(value: float, low: float, high: float) -> int:
    """The whole number nearest to `value` between the limits."""
    return max(1, min(max(round(value), math.ceil(low)), math.floor(high)))


# --- shuffling --------------------------------------------------------------------------------------------------


def _windows(count: int, settings: PerturbSettings) -> list[tuple[int, int]]:
    """[start, end) of the windows within which frames change places; one over all frames for global shuffling.

    A last window of a single frame joins the window before it.
    """
    size = count if settings.mode.endswith("global") else settings.window
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count]))


def _shuffled(windows: list[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    """The order (T,) in which the frames are shown.

    Every window is permuted by one random cycle through all its places (Sattolo's algorithm). So no frame stays where
    it was, and the window looks different as soon as two of its frames do: were it to look the same, each frame would
    equal the next of the cycle, and thus all of them.
    """
    order = np.arange(windows[-1][1])
    for start, end in windows:
        for place in range(end - 1, start, -1):
            other = int(rng.integers(start, place))
            order[[place, other]] = order[[other, place]]
    return order
