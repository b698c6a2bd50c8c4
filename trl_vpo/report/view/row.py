"""One row of preference data as the page shows it: texts cut at their phrases, figures, thumbnails, and its problems.

A record holds JSON values only:

- `n`, the row's position from 0, as in error messages; `id` and `source` where the row has them;
- `problems`, breaches of the row contract; `notes`, what only some methods would mind;
- `prompt`, a list of [role, parts], a part being a text, or ["image", 1] for a placeholder;
- `chosen`, `rejected`, `other_chosen`: the response as [plain, phrase, plain, ...], from `trl_vpo.data.rows.read_row`;
  `chosen_messages`, `rejected_messages`: JSON text, where a response is more than one plain message;
- `media`, groups of pictures: `title`, `what`, and `pictures` [[width, height, caption], ...] or `error`;
- `columns`, [name, scalar] of all other columns; `more`, [name, JSON text] of those that hold no scalar;
- `raw`, JSON text, in the place of texts and media where the row cannot be read.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.columns import NUMBERS
from trl_vpo.data.messages import OTHER, REJECTED
from trl_vpo.data.row_media import LISTS
from trl_vpo.data.rows import COLUMNS, ROW_INDEX, SIDES, Row, read_row, response_text, row_name
from trl_vpo.data.trunk_media import trunk_media
from trl_vpo.media.images import describe, shrink
from trl_vpo.media.load import Clip, VideoOptions, load_image, load_video
from trl_vpo.report.view.data import Unreadable
from trl_vpo.report.view.values import as_json, is_scalar, plain
from trl_vpo.text.phrases import CLOSE, OPEN

THUMB_PIXELS = 192 * 192  # most of a frame, or of an item of an image list
IMAGE_FACTOR = 4  # an image may have so many times the pixels of a frame: it is looked at alone
SHOWN_COLUMNS = set(COLUMNS) - {"tools", "chat_template_kwargs", *NUMBERS}  # these count as other columns
FORMS = {  # form of a row's media -> the columns that it reads, and how its problems begin
    "pair": (REJECTED, ""),
    "symmetric": (OTHER, "Other media (SymMPO): "),
    "ranking": (("critical_box", "critical_span", *LISTS), "List (LPOI): "),
}
Compared = list[tuple[str, Row]]  # the row as each form reads it
Pictures = list[tuple[Image.Image, str]]  # with captions
Loader = Callable[[], tuple[str, Pictures]]  # gives figures about the source, too


@dataclass(frozen=True)
class Look:
    """Options of how media are shown."""

    media_root: str | Path | None = None  # the folder that relative paths start from
    num_frames: int = 8  # most of a clip


def show_row(index: int, example: dict | Unreadable, look: Look) -> tuple[dict, list[str]]:
    """Return a row's record (see above) and its pictures as data URLs, in the order of the groups.

    Nothing that is wrong with the row or its files is raised: it stands in the record.
    """
    record: dict[str, Any] = {"n": index, "problems": [], "notes": []}
    if isinstance(example, Unreadable):
        return record | {"problems": [example.reason], "columns": [], "more": [], "raw": example.text}, []
    record |= {key: str(example[key]) for key in ("id", "source") if example.get(key) is not None}
    others = {key: value for key, value in example.items() if key not in SHOWN_COLUMNS and value is not None}
    record["columns"] = [[key, plain(value)] for key, value in others.items() if is_scalar(value)]
    record["more"] = [[key, as_json(value)] for key, value in others.items() if not is_scalar(value)]
    row, compared = _read(example, index, record)
    if row is None:
        record["raw"] = as_json(example)
        return record, []
    record["prompt"] = _prompt(row.prompt)
    for side in row.sides:
        response = getattr(row, side)
        text, phrases = response_text(response), getattr(row, f"{side}_phrases", None) or []
        # Offsets would not do: they count code points here, and UTF-16 units in a browser.
        cuts = [0, *(offset for span in sorted(phrases) for offset in span), len(text)]
        record[side] = [text[start:end] for start, end in pairwise(cuts)]
        if not isinstance(response, str) and (len(response) > 1 or set(response[0]) - {"role", "content"}):
            record[f"{side}_messages"] = as_json(response)
    record["media"], urls = [], []
    for title, what, load in _sources(row, compared, look):
        try:
            figures, pictures = load()
        except Exception as error:  # as for rows: whatever a file does, the page says so and continues
            record["media"].append({"title": title, "what": what, "error": _message(error)})
            continue
        captions = [[*picture.size, caption] for picture, caption in pictures]
        record["media"].append({"title": title, "what": what + figures, "pictures": captions})
        urls += [_data_url(picture) for picture, _ in pictures]
    return record, urls


def _read(example: dict, index: int, record: dict) -> tuple[Row | None, Compared]:
    """Read the row with its phrases, and as each form of its media reads it; note in the record what is wrong."""
    example = {**example, ROW_INDEX: index}

    def read(kind: str, about: str, **parts: bool) -> Row | None:
        try:
            return read_row(example, **parts)
        except Exception as error:  # a page about broken data must outlive whatever a row holds
            record[kind].append(about + _message(error, f"{row_name(example)}: "))
            return None

    filled = [form for form, (names, _) in FORMS.items() if any(example.get(name) is not None for name in names)]
    pair = "pair" in filled
    row = read("problems", "", media_form="pair" if pair else None)
    if row is None:
        return None, []
    given = any(example.get(f"{side}_phrases") is not None for side in SIDES)
    tagged = any(tag in response_text(text) for tag in (OPEN, CLOSE) for text in (row.chosen, row.rejected))
    if not pair:
        row = read("problems" if given or tagged else "notes", "Phrases (RRPO): ", phrases=True) or row
    compared = [("pair", row)] * pair
    for form in filled[pair:]:
        if (other := read("problems", FORMS[form][1], media_form=form)) is not None:
            compared.append((form, other))
            row.other_chosen = row.other_chosen or other.other_chosen
    return row, compared


def _message(error: Exception, row: str = "") -> str:
    text = str(error).removeprefix(row)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _prompt(prompt: list[dict] | str) -> list[list]:
    if isinstance(prompt, str):
        return [["prompt", [prompt]]]
    counts = {"image": 0, "video": 0}
    messages = []
    for message in prompt:
        parts: list[str | list] = []
        for part in message["content"]:
            kind = part["type"]
            if kind in counts:
                counts[kind] += 1
                parts.append([kind, counts[kind]])
            else:
                parts.append(str(part.get("text", "")) if kind == "text" else as_json(part))
        messages.append([str(message["role"]), parts])
    return messages


def _sources(row: Row, compared: Compared, look: Look) -> Iterator[tuple[str, str, Loader]]:
    """Yield (title, name, loader) of each group of pictures."""
    yield from _named("", row.videos, row.images, look)
    for form, other in compared:
        kind = "Image list" if other.images else "Video list"
        for name in ("critical_box", "critical_span"):
            if (where := getattr(other, name)) is not None:
                yield kind, f"drawn from {name} {as_json(where)}", partial(_list, other, look)
        if other.media_list and form == "ranking":
            yield kind, "as the row gives it", partial(_list, other, look)
        elif other.media_list:
            images, videos = other.media_list[1]
            yield from _named("Rejected " if form == "pair" else "Other ", videos, images, look)


def _named(what: str, videos: list, images: list, look: Look) -> Iterator[tuple[str, str, Loader]]:
    for kind, sources, load in (("video", videos, _clip), ("image", images, _image)):
        for number, source in enumerate(sources, 1):
            yield f"{what}{kind} {number}".capitalize(), describe(source), partial(load, source, look)


def _options(look: Look) -> VideoOptions:
    return VideoOptions(num_frames=look.num_frames, max_frames=look.num_frames, max_pixels=THUMB_PIXELS)


def _clip(source: Any, look: Look) -> tuple[str, Pictures]:
    clip = load_video(source, _options(look), media_root=look.media_root)
    rate = f"{clip.fps:.2f}".rstrip("0").rstrip(".")
    return f" · {clip.duration:.2f} s · {clip.total_frames} frames · {rate} a second", _frames(clip, look)


def _frames(clip: Clip, look: Look) -> Pictures:
    # A row may ask for other frames than these options; then fewer of the frames that it asks for are shown.
    count = min(len(clip.frames), look.num_frames)
    chosen = np.linspace(0, len(clip.frames) - 1, count).round().astype(int)
    frames = [shrink(Image.fromarray(np.ascontiguousarray(clip.frames[i])), THUMB_PIXELS) for i in chosen]
    return [(frame, f"{clip.timestamps[i]:.2f} s") for frame, i in zip(frames, chosen)]


def _image(source: Any, look: Look) -> tuple[str, Pictures]:
    image = load_image(source, media_root=look.media_root, limit=False)
    return f" · {image.width}x{image.height}", [(shrink(image, IMAGE_FACTOR * THUMB_PIXELS), "")]


def _list(row: Row, look: Look) -> tuple[str, Pictures]:
    """Load or draw a row's list as LPOI's collator does: its images, or the frames of its clips with their times."""
    options = {"video": _options(look), "max_pixels": THUMB_PIXELS, "media_root": look.media_root}
    items = trunk_media(row, PreferenceCollator(None, **options))
    pictures = []
    for k, item in enumerate(items):
        name = f"rank {k + 1}" if row.media_list else f"{100 * k / (len(items) - 1):.0f} % hidden"
        pictures += [(image, name) for image in item.images]
        pictures += [(frame, f"{name}, {time}") for clip in item.videos for frame, time in _frames(clip, look)]
    return "", pictures


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
