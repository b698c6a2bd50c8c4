"""The media of a row: its own, and others that a method scores responses behind.

A config's `media_form` says what a method does with them:

| form | method | second media |
| --- | --- | --- |
| None | most | none |
| "pair" | DPO | of the rejected response: `rejected_images`, `rejected_videos`; or a drawn corruption |
| "contrast" | mDPO | of the chosen response again: as DPO's, or the second of an `image_list` or `video_list` |
| "ranking" | LPOI | `image_list` or `video_list`, most visible first; or drawn by `critical_box` or `critical_span` |
| "symmetric" | SymMPO | `other_images`, `other_videos`, with a good response of their own, `other_chosen` |
"""

from types import NoneType
from typing import Any

import numpy as np

from trl_vpo.data.messages import KINDS, OTHER, REJECTED, drop_none
from trl_vpo.errors import RowError

LISTS = ("image_list", "video_list")
MEDIA = ("videos", "video", "images", "image", *LISTS, *REJECTED, *OTHER)
Sources = tuple[list, list]  # images and videos


def media_sources(example: dict, kind: str) -> list:
    """Return the images or videos of a row, from the column of the plural or of the singular."""
    many, one = column_list(example, f"{kind}s"), example.get(kind)
    if many is not None and one is not None:
        raise RowError(f"both `{kind}s` and `{kind}` are filled. Keep one of them.")
    return many if many is not None else [] if one is None else [one]


def own_sources(example: dict) -> Sources:
    """Return the images and videos of a row; a list brings its first item."""
    firsts = [(column_list(example, name) or [])[:1] for name in LISTS]
    return tuple(media_sources(example, kind) or first for kind, first in zip(KINDS, firsts))


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


def has_rejected_media(example: dict, form: str | None) -> bool:
    """Return whether a row gives media of the rejected response. Raises RowError where the form reads none."""
    given = any(column_list(example, column) for column in REJECTED)
    if given and form not in ("pair", "contrast"):
        raise RowError(
            "has media of its own for the rejected response (`rejected_images` or `rejected_videos`), which only DPO "
            "and mDPO read. Train it with one of them, or drop the columns."
        )
    return given


def find_media(row: Any, example: dict, form: str | None) -> None:
    """Fill what `row` has of the form's second media; `row.images` and `row.videos` are its own. Raises RowError."""
    if has_rejected_media(example, form):
        second = _second(row, example, REJECTED)
        if not _same_names((row.images, row.videos), second):
            row.media_list = [(row.images, row.videos), second]
    elif form == "contrast":
        _find_contrast(row, example)
    elif form == "ranking":
        _find_ranking(row, example)
    elif form == "symmetric":
        if not any(column_list(example, column) for column in OTHER):
            raise RowError("SymMPO needs the other media of the pair in `other_images` or `other_videos`.")
        second = _second(row, example, OTHER)
        if _same_names((row.images, row.videos), second):
            raise RowError("`other_images` and `other_videos` are its own media: SymMPO compares two. Give others.")
        row.media_list = [(row.images, row.videos), second]


def _second(row: Any, example: dict, columns: tuple[str, str]) -> Sources:
    """Return the second media of a row; the kind that is not given is the row's own."""
    second = []
    for column, kind, own in zip(columns, KINDS, (row.images, row.videos)):
        given = column_list(example, column) or own
        if len(given) != len(own):
            raise RowError(
                f"`{column}` has {len(given)} item(s), but the row has {len(own)} {kind}(s). Both prompts have the "
                f"same placeholders: give one item for each of `{kind}s`."
            )
        second.append(given)
    return tuple(second)


def _find_contrast(row: Any, example: dict) -> None:
    if not row.images and not row.videos:
        raise RowError("mDPO needs an image or a video, of which it sees a corrupted copy. Leave the row out.")
    row.media_list = _given_list(row, example)
    if row.media_list is not None and len(row.media_list) > 2:
        raise RowError(
            f"its list has {len(row.media_list)} items; mDPO compares two, the image or video and a corrupted one."
        )


def _find_ranking(row: Any, example: dict) -> None:
    box, span = column_list(example, "critical_box"), column_list(example, "critical_span")
    row.media_list = _given_list(row, example)
    if row.media_list is not None:
        return
    if len(row.images) + len(row.videos) != 1:
        raise RowError(
            "LPOI needs exactly one image in `images` or one video in `videos`, the row has "
            f"{len(row.images)} and {len(row.videos)}."
        )
    if box is not None and span is not None:
        raise RowError("has a `critical_box` and a `critical_span`; one of them says what is hidden. Drop the other.")
    if span is not None and row.images:
        raise RowError("has a `critical_span`, the seconds of a video, but an image. Give a `critical_box`.")
    if box is None and span is None:
        raise RowError(
            "LPOI needs a `critical_box` [x0, y0, x1, y1] in pixels, a `critical_span` [start, end] in seconds of a "
            "video, an `image_list` or a `video_list`. The row has none: `trl-vpo generate lpoi` finds boxes."
        )
    row.critical_box, row.critical_span = box, span


def _given_list(row: Any, example: dict) -> list[Sources] | None:
    """Return the media of the row's `image_list` or `video_list`, one item each."""
    lists = {name: listed for name in LISTS if (listed := column_list(example, name)) is not None}
    if not lists:
        return None
    if len(lists) > 1 or len(row.images) + len(row.videos) > 1:
        raise RowError(
            f"has {' and '.join(f'`{name}`' for name in lists)}, {len(row.images)} image(s) and {len(row.videos)} "
            "video(s). A list is of the row's one image or video: drop what does not belong to it."
        )
    ((name, listed),) = lists.items()
    kind = name.removesuffix("_list")
    if len(listed) < 2:
        raise RowError(f"`{name}` has {len(listed)} {kind}(s); a ranking needs at least two.")
    items = [([item], []) if kind == "image" else ([], [item]) for item in listed]
    if not _same((row.images, row.videos), items[0]):
        raise RowError(
            f"has an image or a video beside its `{name}`, which is not the list's first: only the list would be "
            "used. Drop one of the two columns, or put it first into the list."
        )
    return items


def _same_names(first: Sources, second: Sources) -> bool:
    """Return whether sources are the same files. Others hold pixels, and are not compared."""
    return all(isinstance(item, (str, dict)) for items in second for item in items) and _same(first, second)


def _same(first: Sources, second: Sources) -> bool:
    """Return whether sources are equal, as far as they tell. No file is opened."""
    if list(map(len, first)) != list(map(len, second)):
        return False
    return all(_equal(a, b) for ours, theirs in zip(first, second) for a, b in zip(ours, theirs))


def _equal(first: Any, second: Any) -> bool:
    if first is second:  # not compared: an image would read its pixels
        return True
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    return drop_none(first) == drop_none(second)  # `datasets` adds `None`
