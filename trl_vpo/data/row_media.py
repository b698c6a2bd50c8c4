"""The media of a row: its own, and those that a method scores responses behind besides."""

from types import NoneType
from typing import Any

import numpy as np

from trl_vpo.data.messages import drop_none
from trl_vpo.errors import RowError

MEDIA = ("videos", "video", "images", "image", "image_list")


def media_sources(example: dict, kind: str) -> list:
    """Return the images or videos of a row, from the column of the plural or of the singular."""
    many, one = column_list(example, f"{kind}s"), example.get(kind)
    if many is not None and one is not None:
        raise RowError(f"both `{kind}s` and `{kind}` are filled. Keep one of them.")
    return many if many is not None else [] if one is None else [one]


def column_list(example: dict, column: str) -> list | None:
    value = example.get(column)
    if isinstance(value, np.ndarray) and value.ndim == 1:  # a column of a dataset with NumPy's format
        value = list(value)
    if not isinstance(value, (list, tuple, NoneType)):
        hint = f" One item goes into `{column[:-1]}`." if column in ("images", "videos") else ""
        raise RowError(f"`{column}` must be a list, got {type(value).__name__}.{hint}")
    missing = [i for i, item in enumerate(value or ()) if item is None]
    if missing:
        raise RowError(f"`{column}` has nothing at position {missing}. Give every item or shorten the list.")
    return None if value is None else list(value)


def find_image_list(row: Any, example: dict, *, crop: bool) -> None:
    method = "mDPO" if crop else "LPOI"
    listed, box = column_list(example, "image_list"), column_list(example, "critical_box")
    if row.videos:
        raise RowError(f"{method} ranks images, but the row has videos. Train it with LeanPO, RRPO or DPO.")
    if len(row.images) != 1 and listed != []:
        raise RowError(f"{method} needs exactly one image in `images`, the row has {len(row.images)}.")
    if listed is not None:
        if len(listed) < 2:
            raise RowError(f"`image_list` has {len(listed)} image(s); a ranking needs at least two.")
        if crop and len(listed) > 2:
            raise RowError(f"`image_list` has {len(listed)} images; mDPO compares two, the image and a corrupted one.")
        image, first = row.images[0], listed[0]
        arrays = isinstance(image, np.ndarray) or isinstance(first, np.ndarray)
        # The same object is not compared: an image would read its pixels, and no file is opened here.
        same = image is first or (
            np.array_equal(image, first) if arrays else drop_none(image) == drop_none(first)
        )  # `datasets` adds `None`
        if not same:
            raise RowError(
                "has an image beside its `image_list`, which is not the list's first: only the list would be used. "
                "Drop one of the two columns, or put the image first into the list."
            )
        row.image_list = listed
    elif crop:
        return  # the collator draws it
    elif box is not None:
        row.critical_box = box
    else:
        raise RowError(
            "LPOI needs a `critical_box` [x0, y0, x1, y1] in pixels, or an `image_list`. The row has none: `trl-vpo "
            "generate lpoi` finds boxes."
        )
