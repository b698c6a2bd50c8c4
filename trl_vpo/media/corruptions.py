"""Corrupt media so that a model answers worse. Every draw follows from the seed alone.

Damage, for LeanPO's losing response (arXiv 2506.05260): few frames of a clip are kept, all with the same
random-resized crop, colour jitter, greyscale, Gaussian blur and horizontal flip. The flip exchanges left and right, so
a losing response about directions may be wrong for that reason only; `flip_p=0` turns it off.

Perturbation, for RRPO's mistakes (arXiv 2504.12083, section 3.1): one square, at the same place in every frame of a
clip, covers 25-50 % of the area with a light grey; and the frames change places within short windows ("local") or over
the whole clip ("global"). The timestamps stay, so nothing tells the model. The paper found masking with
local shuffling to work best. It gives neither the windows nor the kind of permutation: both are ours, see `_shuffled`.

Contrasts, for media that a response is compared on (mDPO, visual contrast): one of `CONTRASTS`, see `corrupted`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from trl_vpo.errors import InputError, RowError
from trl_vpo.media.load import Clip, Media

# --- damage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DamageSettings:
    """The ranges that damage is drawn from; the defaults are the paper's."""

    num_frames: int = 2  # kept of a clip; all of a shorter one
    area: tuple[float, float] = (0.08, 0.30)  # share of the frame that the crop keeps
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, drawn evenly in its logarithm
    brightness: float = 0.4  # the factor is drawn from 1 - value to 1 + value, as the next two are
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shift, drawn from -value to value in turns of the colour circle
    jitter_p: float = 0.8  # probability of colour jitter, as grey_p and flip_p are of theirs
    grey_p: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels; always blurred: the paper gives no probability
    flip_p: float = 0.5


@dataclass(frozen=True)
class Damage:
    """The damage of one clip or image."""

    frames: tuple[int, ...]  # positions of the frames that are kept, ascending
    crop: tuple[int, int, int, int]  # top, left, height, width in pixels; scaled back to the size of the frame
    jitter: tuple[tuple[str, float], ...]  # (name, factor) in the order they are applied; or empty
    grey: bool
    sigma: float  # of the blur, in pixels
    flip: bool


def damage(media: Media, rng: np.random.Generator, settings: DamageSettings) -> Media:
    """Return damaged copies of all clips and images, each with a damage of its own. Sizes and timestamps stay."""
    images, videos = [], []
    for image in media.images:
        frames = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
        drawn = draw_damage(rng, 1, frames.shape[1:3], settings)
        images.append(Image.fromarray(apply_damage(frames, drawn)[0]))
    for clip in media.videos:
        drawn = draw_damage(rng, len(clip.frames), clip.frames.shape[1:3], settings)
        kept = clip.timestamps[list(drawn.frames)]
        videos.append(replace(clip, frames=apply_damage(clip.frames, drawn), timestamps=kept))
    return Media(tuple(images), tuple(videos))


def draw_damage(rng: np.random.Generator, num_frames: int, size: tuple[int, int], settings: DamageSettings) -> Damage:
    """Draw the damage of a clip of `num_frames` frames of `size` (height, width)."""
    kept = rng.choice(num_frames, size=min(num_frames, settings.num_frames), replace=False)
    height, width = size
    area = rng.uniform(*settings.area) * height * width
    ratio = math.exp(rng.uniform(*(math.log(value) for value in settings.ratio)))
    h = min(height, max(1, round(math.sqrt(area / ratio))))  # in a frame too narrow for it, the crop is cut
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    factors = [(name, getattr(settings, name)) for name in ("brightness", "contrast", "saturation")]
    jitter = [(name, rng.uniform(1 - most, 1 + most)) for name, most in factors]
    jitter.append(("hue", rng.uniform(-settings.hue, settings.hue)))
    order = rng.permutation(len(jitter))
    return Damage(
        frames=tuple(sorted(kept.tolist())),
        crop=(top, left, h, w),
        jitter=tuple(jitter[i] for i in order) if rng.random() < settings.jitter_p else (),
        grey=bool(rng.random() < settings.grey_p),
        sigma=rng.uniform(*settings.blur_sigma),
        flip=bool(rng.random() < settings.flip_p),
    )


def apply_damage(frames: np.ndarray, drawn: Damage) -> np.ndarray:
    """Return the frames that `drawn` keeps of (T, H, W, 3) uint8, damaged: (len(drawn.frames), H, W, 3) uint8."""
    import torch
    from torchvision.transforms.v2 import functional as F

    height, width = frames.shape[1:3]
    picked = torch.from_numpy(frames[list(drawn.frames)]).permute(0, 3, 1, 2)  # (T, 3, H, W); indexing has copied
    picked = F.resized_crop(picked, *drawn.crop, size=[height, width], antialias=True)
    for name, factor in drawn.jitter:
        picked = getattr(F, f"adjust_{name}")(picked, factor)
    if drawn.grey:
        picked = F.rgb_to_grayscale(picked, num_output_channels=3)
    # three sigma on each side hold 99.7 % of the kernel; the mirrored border must be shorter than the frame
    reach = min(math.ceil(3 * drawn.sigma), height - 1, width - 1)
    picked = F.gaussian_blur(picked, kernel_size=[2 * reach + 1] * 2, sigma=[drawn.sigma] * 2)
    if drawn.flip:
        picked = F.horizontal_flip(picked)
    return picked.permute(0, 2, 3, 1).contiguous().numpy()


# --- perturbation -----------------------------------------------------------------------------------------------

FILL = (245, 245, 245)
MODES = ("mask+local", "mask+global", "mask", "local", "global")


@dataclass(frozen=True)
class PerturbSettings:
    """Settings of perturbation; the defaults are the paper's, apart from the window."""

    mode: str = "mask+local"  # one of `MODES`
    area: tuple[float, float] = (0.25, 0.5)  # smallest and largest share of the frame that is masked
    window: int = 4  # frames that change places with each other in local shuffling

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"perturbation is {self.mode!r}: one of {', '.join(MODES)}.")
        if not 0 < self.area[0] <= self.area[1] < 1:
            raise ValueError(f"the masked area is {self.area}: give two shares above 0 and below 1, in order.")
        if self.window < 2:
            raise ValueError(f"shuffle_window is {self.window}: give at least 2 frames.")


def perturb(media: Media, seed: int, settings: PerturbSettings) -> Media:
    """Return perturbed copies of all images and clips, each with a mask of its own; sizes and timestamps stay.

    The same seed draws the same masks in every mode with masks. Raises InputError as `effective_mode` does.
    """
    parts = effective_mode(media, settings).split("+")
    masks, orders = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    images, videos = list(media.images), [clip.frames for clip in media.videos]
    if "mask" in parts:
        pictures = (np.asarray(image.convert("RGB"))[None] for image in images)  # (1, H, W, 3) each
        images = [Image.fromarray(_masked(picture, masks, settings.area)[0]) for picture in pictures]
        videos = [_masked(frames, masks, settings.area) for frames in videos]
    if parts[-1] != "mask":
        videos = [frames[_shuffled(_windows(len(frames), settings), orders)] for frames in videos]
    return Media(tuple(images), tuple(replace(clip, frames=f) for clip, f in zip(media.videos, videos)))


def effective_mode(media: Media, settings: PerturbSettings) -> str:
    """Return the part of the mode that these media allow: images, single frames and still clips cannot be shuffled.

    Raises InputError if the mode only shuffles, and there is nothing to shuffle.
    """
    windows = [clip.frames[a:b] for clip in media.videos for a, b in _windows(len(clip.frames), settings)]
    if settings.mode == "mask" or any((frames[1:] != frames[0]).any() for frames in windows):
        return settings.mode
    if settings.mode.startswith("mask"):
        return "mask"
    raise InputError(
        f"{settings.mode} shuffling changes nothing: the row has {len(media.images)} image(s) and "
        f"{len(media.videos)} clip(s), none with different frames to exchange. Use a perturbation with mask."
    )


def _masked(frames: np.ndarray, rng: np.random.Generator, area: tuple[float, float]) -> np.ndarray:
    """Return a copy of (T, H, W, 3) uint8 frames with one box, the same in all of them, filled with `FILL`."""
    height, width = frames.shape[1:3]
    box_height, box_width = mask_size(height, width, rng.uniform(*area), area)
    top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
    frames = frames.copy()
    frames[:, top : top + box_height, left : left + box_width] = FILL
    return frames


def mask_size(height: int, width: int, share: float, area: tuple[float, float]) -> tuple[int, int]:
    """Return (height, width) in pixels of the box that covers about `share` of a frame.

    A square if it fits; else a box that is as high (or wide) as the frame. Whole pixels are chosen so that the covered
    share lies within `area`; where a frame has too few for that, the box is the next smaller one.
    """
    short, long = sorted((height, width))
    square = math.sqrt(share * short * long) <= short
    # the length that is looked for, and its limits
    value, low, high = (math.sqrt(part * short * long) if square else part * long for part in (share, *area))
    length = max(1, min(max(round(value), math.ceil(low)), math.floor(high)))
    if square:
        return length, length
    return (short, length) if height <= width else (length, short)


def _windows(count: int, settings: PerturbSettings) -> list[tuple[int, int]]:
    """Return [start, end) of the windows within which frames change places; for global shuffling there is one."""
    size = count if settings.mode.endswith("global") else settings.window
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()  # a last window of a single frame joins the one before it
    return list(zip(starts, [*starts[1:], count]))


def _shuffled(windows: list[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    """Return the order (T,) in which the frames are shown.

    Every window is permuted by one random cycle through all its places (Sattolo's algorithm). So no frame stays where
    it was, and the window looks different as soon as two of its frames do.
    """
    order = np.arange(windows[-1][1])
    for start, end in windows:
        for place in range(end - 1, start, -1):
            other = int(rng.integers(start, place))
            order[[place, other]] = order[[other, place]]
    return order


# --- contrasts --------------------------------------------------------------------------------------------------

TIMED = ("shuffle", "reverse", "drop")
CONTRASTS = ("crop", "mask", "blank", *TIMED)
CROP = DamageSettings(area=(0.01, 0.2))  # mDPO's
KEPT = DamageSettings.num_frames  # frames of a clip that `drop` leaves


def check_contrast(media: Media, name: str) -> None:
    """Raise RowError for media that a corruption of `CONTRASTS` does not change."""
    if name not in TIMED:
        return
    if media.images:
        raise RowError(
            f"media_contrast {name!r} changes the order or number of frames, and the row has an image, which has no "
            "time. Take crop, mask or blank, or leave the row out."
        )
    least = KEPT + 1 if name == "drop" else 2
    for clip in media.videos:
        if len(clip.frames) < least:
            raise RowError(
                f"media_contrast {name!r} needs at least {least} frames, and {clip.source} is sampled at "
                f"{len(clip.frames)}. Raise num_frames, take crop, mask or blank, or leave the row out."
            )


def kept_frames(media: Media, name: str) -> Media:
    """Return media of the shapes that a corruption gives: `drop` leaves few frames, the others leave all."""
    if name != "drop":
        return media
    clips = (replace(clip, frames=clip.frames[:KEPT], timestamps=clip.timestamps[:KEPT]) for clip in media.videos)
    return replace(media, videos=tuple(clips))


def corrupted(media: Media, name: str, seed: int) -> Media:
    """Return corrupted copies of all images and clips. Sizes stay, and timestamps, so nothing tells the model.

    crop: 1-20 % of the area, scaled back; the same for all frames of a clip (mDPO, arXiv 2406.11839). mask: RRPO's
    light-grey box. blank: black. shuffle: the frames change places over the whole clip, none stays. reverse: they
    come from last to first. drop: 2 frames are kept, with their times. Raises RowError as `check_contrast` does.
    """
    check_contrast(media, name)
    rng = np.random.default_rng(seed)
    if name == "mask":
        return perturb(media, seed, PerturbSettings(mode="mask"))
    if name == "crop":
        images = tuple(_cropped(image.convert("RGB"), _crop_box(rng, image.size)) for image in media.images)
        return Media(images, tuple(_cropped_clip(clip, rng) for clip in media.videos))
    if name == "blank":
        return blanked(media)
    return replace(media, videos=tuple(_reordered(clip, name, rng) for clip in media.videos))


def blanked(media: Media) -> Media:
    """Return black images and clips of the same sizes."""
    images = tuple(Image.new("RGB", image.size) for image in media.images)
    return Media(images, tuple(replace(clip, frames=np.zeros_like(clip.frames)) for clip in media.videos))


def _crop_box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw the (left, top, right, bottom) of a crop of an image of (width, height)."""
    top, left, height, width = draw_damage(rng, 1, size[::-1], CROP).crop
    return left, top, left + width, top + height


def _cropped(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _cropped_clip(clip: Clip, rng: np.random.Generator) -> Clip:
    box = _crop_box(rng, clip.frames.shape[2:0:-1])
    return replace(clip, frames=np.stack([np.asarray(_cropped(Image.fromarray(f), box)) for f in clip.frames]))


def _reordered(clip: Clip, name: str, rng: np.random.Generator) -> Clip:
    count = len(clip.frames)
    if name == "drop":
        kept = np.sort(rng.choice(count, size=KEPT, replace=False))
        return replace(clip, frames=clip.frames[kept], timestamps=clip.timestamps[kept])
    order = np.arange(count)[::-1] if name == "reverse" else _shuffled([(0, count)], rng)
    return replace(clip, frames=clip.frames[order])
