"""LPOI's list: an image or a clip with its critical object or moment more and more hidden, drawn from a box or span.

Pixel rules, all in integers. A box [x0, y0, x1, y1] covers the pixels x0 <= x < x1 and y0 <= y < y1; fractions are
rounded outwards, so that the object is covered whole. The black rectangle grows from the side of the box that is
nearest to the border of the image (left: x0, right: W - x1, top: y0, bottom: H - y1 pixels away); of equally near
sides the first of left, right, top, bottom is taken. Of a box that is L pixels long in that direction, item k of N
hides ceil((k - 1) * L / (N - 1)) pixels. With more items than pixels, some neighbours are equal.

In a clip the same rectangle is hidden in every frame. Its box is in pixels of the frames as they are stored; it is
scaled with them, and rounded outwards.

A span [start, end] covers the sampled frames at start <= t <= end seconds. Of M such frames, item k of N blacks out
ceil((k - 1) * M / (N - 1)), spread evenly: numbered 0 to M - 1 in time, they go in the order of their numbers' bits
read backwards (of 8 frames 0, 4, 2, 6, 1, 5, 3, 7), so every item hides what the one before hides, and more. With more
items than frames, some neighbours are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from trl_vpo.errors import RowError
from trl_vpo.media.load import Clip


def check_box(box: Sequence[float], size: tuple[int, int]) -> None:
    """Raise RowError, naming the box, the image's (width, height) and the remedy, unless the box lies in the image."""
    width, height = size
    try:
        if isinstance(box, str) or any(isinstance(value, (str, bytes, bool)) for value in box):
            raise TypeError("a string")
        problem = _box_problem([float(value) for value in box], width, height)
    except (TypeError, ValueError, OverflowError):
        problem = "is not a list of numbers", ""
    if problem:
        box = box.tolist() if hasattr(box, "tolist") else box
        what, remedy = problem
        raise RowError(
            f"critical_box {box} in an image of {width}x{height} pixels {what}: boxes are [x0, y0, x1, y1] in pixels "
            f"of the upright image{remedy}."
        )


def _box_problem(values: list[float], width: int, height: int) -> tuple[str, str] | None:
    """Return what is wrong with a box and how to mend it; None for a good one."""
    if len(values) != 4:
        return f"has {len(values)} values instead of 4", ""
    if not all(map(math.isfinite, values)):
        return "holds a value that is not finite", "; drop the row or detect the object again"
    x0, y0, x1, y1 = values
    if x1 <= x0 or y1 <= y0:
        return "is empty or inverted", " with x0 < x1 and y0 < y1; if it holds width and height, add x, y"
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        return "reaches outside of the image", "; clip it, or check that it was measured on this image at this size"
    if max(values) <= 1 and any(0 < value < 1 for value in values):
        return "seems to hold fractions", f"; multiply x by {width} and y by {height}"
    return None


def masked_image_list(
    image: Image.Image, box: Sequence[float], n: int, *, visual_prompt: bool = True, mask: np.ndarray | None = None
) -> list[Image.Image]:
    """Return N RGB images from fully visible to fully masked: item k hides (k - 1) / (N - 1) of the box in black.

    With a ``mask``, (H, W) bool, only its pixels in that part turn black. ``visual_prompt`` draws a red ellipse around
    the hidden part of every item but the first: it passes through the corners of the hidden rectangle, drawn in to the
    image's border where it would leave the image. Raises ValueError for n < 2 and where :func:`check_box` does.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 2:
        raise ValueError(f"an image list of {n!r}: LPOI ranks at least 2 images.")
    check_box(box, image.size)
    items = [image.convert("RGB") if image.mode != "RGB" else image.copy()]
    stencil = Image.new("L", image.size, 255) if mask is None else Image.fromarray(mask.astype(np.uint8) * 255)
    for k in range(1, n):
        item = items[0].copy()
        x0, y0, x1, y1 = hidden = hidden_box(box, image.size, k, n)
        item.paste((0, 0, 0), hidden, stencil.crop(hidden))
        if visual_prompt:
            dx, dy = (math.ceil(length * (math.sqrt(2) - 1) / 2) for length in (x1 - x0, y1 - y0))
            around = max(0, x0 - dx), max(0, y0 - dy), min(image.width, x1 + dx) - 1, min(image.height, y1 + dy) - 1
            ImageDraw.Draw(item).ellipse(around, outline=(255, 0, 0), width=max(1, round(min(image.size) / 100)))
        items.append(item)
    return items


def hidden_box(box: Sequence[float], size: tuple[int, int], k: int, n: int) -> tuple[int, int, int, int]:
    """Return the pixels [x0, y0, x1, y1) hidden in item ``k`` of ``n`` (from 0): none for 0, the box for n - 1."""
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    distances = {"left": x0, "right": size[0] - x1, "top": y0, "bottom": size[1] - y1}
    side = min(distances, key=distances.get)  # the first of equals
    length = x1 - x0 if side in ("left", "right") else y1 - y0
    depth = -(-k * length // (n - 1))  # rounded up
    return {
        "left": (x0, y0, x0 + depth, y1),
        "right": (x1 - depth, y0, x1, y1),
        "top": (x0, y0, x1, y0 + depth),
        "bottom": (x0, y1 - depth, x1, y1),
    }[side]


# --- clips --------------------------------------------------------------------------------------------------------


def masked_clips(
    clip: Clip, box: Sequence[float], size: tuple[int, int], n: int, *, visual_prompt: bool = True
) -> list[Clip]:
    """Return N clips from fully visible to fully masked, each frame as `masked_image_list` draws it.

    `size`: (width, height) of the stored frames, in whose pixels the box is.
    """
    check_box(box, size)
    height, width = clip.frames.shape[1:3]
    across, down = width / size[0], height / size[1]
    scaled = math.floor(box[0] * across), math.floor(box[1] * down)
    scaled += min(width, math.ceil(box[2] * across)), min(height, math.ceil(box[3] * down))
    frames = [masked_image_list(Image.fromarray(f), scaled, n, visual_prompt=visual_prompt) for f in clip.frames]
    return [replace(clip, frames=np.stack([np.asarray(items[k]) for items in frames])) for k in range(n)]


def check_span(span: Sequence[float], clip: Clip) -> None:
    """Raise RowError, naming the span, the clip and the remedy, unless it covers sampled frames of the clip."""
    numbers = len(span) == 2 and all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in span)
    times = clip.timestamps
    if not numbers or not 0 <= span[0] < span[1] < math.inf:
        problem = "is not [start, end] in seconds with 0 <= start < end. Write both ends as numbers"
    elif span[1] > clip.duration + 0.01:
        problem = f"ends behind the video, which is {clip.duration:.2f} s long. Clip it, or check the video"
    elif not len(_frames_in(span, clip)):
        problem = (
            f"holds none of the {len(times)} sampled frames, which are from {times[0]:.2f} to {times[-1]:.2f} s. "
            "Raise num_frames or fps, or widen the span"
        )
    else:
        return
    raise RowError(f"critical_span {list(span)} of {clip.source} {problem}.")


def blanked_clips(clip: Clip, span: Sequence[float], n: int) -> list[Clip]:
    """Return N clips in which more and more frames of the span are black: none in the first, all in the last."""
    check_span(span, clip)
    inside = _frames_in(span, clip)
    bits = (len(inside) - 1).bit_length()
    order = inside[sorted(range(len(inside)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]
    clips = [clip]
    for k in range(1, n):
        frames = clip.frames.copy()
        frames[order[: -(-k * len(order) // (n - 1))]] = 0
        clips.append(replace(clip, frames=frames))
    return clips


def _frames_in(span: Sequence[float], clip: Clip) -> np.ndarray:
    return np.flatnonzero((clip.timestamps >= span[0]) & (clip.timestamps <= span[1]))
