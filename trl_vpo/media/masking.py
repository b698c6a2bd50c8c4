"""LPOI's image list: one image with its critical object more and more hidden, drawn from a stored box.

Pixel rules, all in integers. A box [x0, y0, x1, y1] covers the pixels x0 <= x < x1 and y0 <= y < y1; fractions are
rounded outwards, so that the object is covered whole. The black rectangle grows from the side of the box that is
nearest to the border of the image (left: x0, right: W - x1, top: y0, bottom: H - y1 pixels away); of equally near
sides the first of left, right, top, bottom is taken. Of a box that is L pixels long in that direction, item k of N
hides ceil((k - 1) * L / (N - 1)) pixels. With more items than pixels, some neighbours are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from trl_vpo.errors import RowError


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
    image: Image.Image, box: Sequence[float], n: int, *, visual_prompt: bool = True
) -> list[Image.Image]:
    """Return N RGB images from fully visible to fully masked: item k hides (k - 1) / (N - 1) of the box in black.

    With ``visual_prompt`` a red ellipse is drawn around the hidden part of every item but the first: it passes through
    the corners of the hidden rectangle, drawn in to the image's border where it would leave the image. Raises
    ValueError for n < 2 and where :func:`check_box` does.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 2:
        raise ValueError(f"an image list of {n!r}: LPOI ranks at least 2 images.")
    check_box(box, image.size)
    items = [image.convert("RGB") if image.mode != "RGB" else image.copy()]
    for k in range(1, n):
        item = items[0].copy()
        x0, y0, x1, y1 = hidden_box(box, image.size, k, n)
        draw = ImageDraw.Draw(item)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(0, 0, 0))  # Pillow draws the last row and column too
        if visual_prompt:
            dx, dy = (math.ceil(length * (math.sqrt(2) - 1) / 2) for length in (x1 - x0, y1 - y0))
            around = max(0, x0 - dx), max(0, y0 - dy), min(image.width, x1 + dx) - 1, min(image.height, y1 + dy) - 1
            draw.ellipse(around, outline=(255, 0, 0), width=max(1, round(min(image.size) / 100)))
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
