"""One row of preference data as the page shows it: texts cut at their phrases, figures, thumbnails, and its problems.

A record holds JSON values only:

- `n`, the row's position from 0, as in error messages; `id` and `source` where the row has them;
- `problems`, what breaks the row contract; `notes`, what only some methods would mind;
- `prompt`, a list of [role, parts], a part being a text, or ["image", 1] for a placeholder;
- `chosen`, `rejected`: the response as [plain, phrase, plain, phrase, ...], from `trl_vpo.data.rows.read_row`;
  `chosen_messages`, `rejected_messages`: JSON text, where a response is more than one plain message;
- `media`, groups of pictures: `title`, `what`, and `pictures` [[width, height, caption], ...] or `error`;
- `columns`, [name, scalar] of all other columns; `more`, [name, JSON text] of those that hold no scalar;
- `raw`, JSON text, in the place of texts and media where the row cannot be read.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.data.rows import COLUMNS, ROW_INDEX, Row, read_row, response_text, row_name
from trl_vpo.media.images import describe, shrink
from trl_vpo.media.load import VideoOptions, load_image, load_video
from trl_vpo.media.masking import masked_image_list
from trl_vpo.text.phrases import CLOSE, OPEN, Span

IMAGE_FACTOR = 4  # an image may have so many times the pixels of a frame: it is looked at alone
LONGEST_JSON = 20_000  # characters
EXACT = 2**53  # larger integers lose digits in a browser
SHOWN_COLUMNS = set(COLUMNS) - {"tools", "chat_template_kwargs"}  # these two count as other columns
Pictures = list[tuple[Image.Image, str]]  # with captions


@dataclass(frozen=True)
class Look:
    """How media are shown.

    Attributes:
        media_root: the folder that relative paths start from.
        num_frames: most frames of a clip.
        thumb_pixels: most pixels of a frame, or of an item of an image list.
        num_images, visual_prompt: of the image list drawn from a `critical_box`, as in `LPOIConfig`.
    """

    media_root: str | Path | None = None
    num_frames: int = 8
    thumb_pixels: int = 192 * 192
    num_images: int = 5
    visual_prompt: bool = True


def show_row(example: dict, index: int, look: Look) -> tuple[dict, list[str]]:
    """The record of a row (see above) and its pictures as data URLs, in the order of the groups. Never raises for what
    is wrong with the row or its files: the record says it."""
    record: dict[str, Any] = {"n": index, "problems": [], "notes": []}
    record |= {key: str(example[key]) for key in ("id", "source") if example.get(key) is not None}
    others = {key: value for key, value in example.items() if key not in SHOWN_COLUMNS and value is not None}
    record["columns"] = [[key, plain(value)] for key, value in others.items() if _is_scalar(value)]
    record["more"] = [[key, as_json(value)] for key, value in others.items() if not _is_scalar(value)]
    row = _read(example, index, record)
    if row is None:
        record["raw"] = as_json(example)
        return record, []
    record["prompt"] = _prompt(row.prompt)
    for side in ("chosen", "rejected"):
        response = getattr(row, side)
        record[side] = pieces(response_text(response), getattr(row, f"{side}_phrases") or [])
        if not isinstance(response, str) and (len(response) > 1 or set(response[0]) - {"role", "content"}):
            record[f"{side}_messages"] = as_json(response)
    record["media"], urls = [], []
    for title, what, load in _sources(row, look):
        group, pictures = _group(title, what, load)
        record["media"].append(group)
        urls += pictures
    return record, urls


def _read(example: dict, index: int, record: dict) -> Row | None:
    """The row, with phrases and image list where it has them. What is wrong goes into the record."""
    example = {**example, ROW_INDEX: index}
    complain = partial(_message, name=row_name(example))
    try:
        row = read_row(example)
    except Exception as error:  # a page about broken data must outlive whatever a row holds
        record["problems"].append(complain(error))
        return None
    try:
        marked = read_row(example, phrases=True)
        row.chosen, row.rejected = marked.chosen, marked.rejected
        row.chosen_phrases, row.rejected_phrases = marked.chosen_phrases, marked.rejected_phrases
    except Exception as error:
        given = any(example.get(f"{side}_phrases") is not None for side in ("chosen", "rejected"))
        tagged = any(tag in response_text(text) for tag in (OPEN, CLOSE) for text in (row.chosen, row.rejected))
        record["problems" if given or tagged else "notes"].append(f"Phrases (RRPO): {complain(error)}")
    if example.get("critical_box") is not None or example.get("image_list") is not None:
        try:
            ranked = read_row(example, image_list=True)
            row.critical_box, row.image_list = ranked.critical_box, ranked.image_list
        except Exception as error:
            record["problems"].append(f"Image list (LPOI): {complain(error)}")
    return row


def _message(error: Exception, name: str = "") -> str:
    text = str(error).removeprefix(f"{name}: ")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


# --- texts --------------------------------------------------------------------------------------------------------


def pieces(text: str, spans: Sequence[Span]) -> list[str]:
    """The text cut at its phrases: plain, phrase, plain, phrase, ..., plain. Joined they are the text.

    Offsets would not do: they count code points here, and UTF-16 units in a browser.
    """
    cuts = [0, *(offset for span in spans for offset in span), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _prompt(prompt: list[dict] | str) -> list[list]:
    if isinstance(prompt, str):
        return [["prompt", [prompt]]]
    seen = {"image": 0, "video": 0}
    messages = []
    for message in prompt:
        parts: list[str | list] = []
        for part in message["content"]:
            kind = part["type"]
            if kind in seen:
                seen[kind] += 1
                parts.append([kind, seen[kind]])
            else:
                parts.append(str(part.get("text", "")) if kind == "text" else as_json(part))
        messages.append([str(message["role"]), parts])
    return messages


# --- media --------------------------------------------------------------------------------------------------------


def _sources(row: Row, look: Look) -> list[tuple[str, str, Callable[[], tuple[str, Pictures]]]]:
    """(title, name, loader) for each group of pictures."""
    root, most = look.media_root, look.thumb_pixels
    found = [(f"Video {n}", describe(s), partial(_clip, s, look)) for n, s in enumerate(row.videos, 1)]
    found += [
        (f"Image {n}", describe(s), partial(_image, s, IMAGE_FACTOR * most, root)) for n, s in enumerate(row.images, 1)
    ]
    if row.critical_box is not None:
        what = f"drawn from critical_box {as_json(row.critical_box)}"
        found.append(("Image list", what, partial(_drawn_list, row.images[0], row.critical_box, look)))
    if row.image_list is not None:
        found.append(("Image list", "as the row gives it", partial(_given_list, row.image_list, look)))
    return found


def _group(title: str, what: str, load: Callable[[], tuple[str, Pictures]]) -> tuple[dict, list[str]]:
    try:
        figures, pictures = load()
    except Exception as error:  # as for rows: whatever a file does, the page says so and goes on
        return {"title": title, "what": what, "error": _message(error)}, []
    shown = [[*picture.size, caption] for picture, caption in pictures]
    return {"title": title, "what": f"{what}{figures}", "pictures": shown}, [data_url(p) for p, _ in pictures]


def _clip(source: Any, look: Look) -> tuple[str, Pictures]:
    options = VideoOptions(num_frames=look.num_frames, max_frames=look.num_frames, max_pixels=look.thumb_pixels)
    clip = load_video(source, options, media_root=look.media_root)
    # A row may ask for other frames than these options; then fewer of the frames that it asks for are shown.
    count = min(len(clip.frames), look.num_frames)
    chosen = np.linspace(0, len(clip.frames) - 1, count).round().astype(int)
    frames = [shrink(Image.fromarray(np.ascontiguousarray(clip.frames[i])), look.thumb_pixels) for i in chosen]
    rate = f"{clip.fps:.2f}".rstrip("0").rstrip(".")
    figures = f" · {clip.duration:.2f} s · {clip.total_frames} frames · {rate} a second"
    return figures, [(frame, f"{clip.timestamps[i]:.2f} s") for frame, i in zip(frames, chosen)]


def _image(source: Any, most: int, root: str | Path | None) -> tuple[str, Pictures]:
    image = load_image(source, media_root=root, limit=False)
    return f" · {image.width}x{image.height}", [(shrink(image, most), "")]


def _drawn_list(source: Any, box: Sequence[float], look: Look) -> tuple[str, Pictures]:
    image = load_image(source, media_root=look.media_root, limit=False)
    items = masked_image_list(image, box, look.num_images, visual_prompt=look.visual_prompt)
    last = len(items) - 1
    return "", [(shrink(item, look.thumb_pixels), f"{100 * k / last:.0f} % hidden") for k, item in enumerate(items)]


def _given_list(sources: Sequence, look: Look) -> tuple[str, Pictures]:
    items = [load_image(source, max_pixels=look.thumb_pixels, media_root=look.media_root) for source in sources]
    return "", [(item, f"rank {k}") for k, item in enumerate(items, 1)]


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- other columns ------------------------------------------------------------------------------------------------


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, (dict, list, tuple, np.ndarray))


def plain(value: Any) -> Any:
    """A value that JSON holds and a browser reads without loss; what is neither text nor number is described."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value if abs(value) <= EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (bytes, bytearray, memoryview, np.ndarray, Image.Image)):
        return describe(value)
    return str(value)  # dates, decimals


def as_json(value: Any) -> str:
    """Readable JSON, cut (and saying so) where it is very long."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=None if _is_flat(value) else 1)
    return text if len(text) <= LONGEST_JSON else f"{text[:LONGEST_JSON]}... ({len(text)} characters in all)"


def _is_flat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_scalar(inner) for inner in value)
