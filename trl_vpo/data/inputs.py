"""The annotated inputs of a run: rows of a dataset as `InputRow`, read one at a time.

Media come from the columns `images` (or `image`) and `videos` (or `video`), with the sources of docs/data.md.
A training row is a line of JSON, so every source becomes one that such a line can hold: an absolute path, a list of
them, or a dictionary with a path and options such as `video_start`. Media without a path are written to a folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import PIL.Image
from datasets import Dataset

from trl_vpo.data.columns import nearest_column
from trl_vpo.data.identity import PAYLOAD
from trl_vpo.data.raw_rows import RawRows
from trl_vpo.data.row_media import media_sources
from trl_vpo.data.rows import MARKERS, drop_none
from trl_vpo.data.sources import named_splits
from trl_vpo.errors import InputError, MediaError, RowError, RunError
from trl_vpo.files import atomic_write, bytes_digest
from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.images import BYTES, describe, frame_folder, load_image, resolve_path
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.text.responses import is_blank

logger = logging.getLogger(__name__)

# The columns that generation and evaluation read, besides those that a setting names.
COLUMNS = (
    "question", "answer", "options", "answer_kind", "images", "image", "videos", "video", "prompt", "chosen",
    "rejected", "objects", "critical_box", "critical_span", "image_list", "video_list", "rejected_images",
    "rejected_videos", "task", "pair", "role", "cluster", "source", "group", "sets", "ordered", "contents",
)  # fmt: skip
CHUNK = 16  # rows read at once for the digest; they may hold whole videos
_MAGIC = (  # (offset, bytes, suffix): for people and web pages; the readers here check the contents
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (8, b"WEBP", ".webp"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
    (8, b"AVI ", ".avi"),
)


@dataclass(frozen=True)
class InputRow:
    """One annotated input. Media are still undecoded sources.

    Attributes:
        id: unique within the run; together with the run's seed it fixes everything random about the row.
        example: the row as the dataset gives it, without its `None` entries.
        images, videos: sources as in docs/data.md; paths are absolute.
        problem: why its media cannot be used; `load_media` raises it, and the input is rejected.
    """

    id: str
    example: dict[str, Any]
    images: tuple = ()
    videos: tuple = ()
    problem: str | None = None

    def user_message(self, text: str) -> dict:
        """Return a user's turn with a placeholder for each image and video, then `text`."""
        media = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * len(self.videos)
        return {"role": "user", "content": [*media, {"type": "text", "text": text}]}

    def media_columns(self) -> dict[str, list]:
        """Return the `images` and `videos` columns of a training row made from this input."""
        return {key: list(value) for key in ("images", "videos") if (value := getattr(self, key))}


def given_text(example: Mapping[str, Any], name: str, method: str) -> str:
    """Return a column that must hold text without media markers, stripped; `method` is the one that needs it."""
    value = example.get(name)
    if not isinstance(value, str) or is_blank(value):
        raise InputError(f"`{name}` is {value!r}: {method} needs it as a text that is not empty.")
    for marker in MARKERS:
        if marker in value:
            raise InputError(f"`{name}` holds the marker {marker}: take it out, media come from their columns.")
    return value.strip()


class Inputs(Sequence[InputRow]):
    """The inputs in the order of the dataset. An index gives an `InputRow`, a slice gives `Inputs`.

    Reading a row writes its media to `media_folder` if they have no path; without a folder they stay as they are.
    """

    def __init__(
        self, dataset: Dataset, ids: list[str], media_folder: Path | None = None, media_root: str | Path | None = None
    ):
        self._rows = RawRows(dataset)
        self._dataset, self.ids, self._folder, self._root = dataset, ids, media_folder, media_root

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> InputRow | Inputs:
        if isinstance(index, slice):
            kept = range(len(self))[index]
            return Inputs(self._dataset.select(kept), self.ids[index], self._folder, self._root)
        index = range(len(self))[index]
        (example,) = self.examples(index, index + 1)
        try:
            sources = {f"{kind}s": media_sources(example, kind) for kind in MARKERS.values()}
            media: dict[str, Any] = {
                name: tuple(portable(source, self._folder, self._root) for source in listed)
                for name, listed in sources.items()
            }
        except (RowError, MediaError) as error:
            media = {"problem": str(error)}
        return InputRow(self.ids[index], drop_none(example), **media)

    def examples(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return rows as the dataset gives them, with Arrow's `None`s. Media stay {"path", "bytes"}, not decoded."""
        return list(self._rows.read(start, stop))


def read_inputs(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = "train",
    media_root: str | None = None,
    media_folder: Path | None = None,
) -> Inputs:
    """Return the inputs in a dataset, named as in `trl_vpo.data.sources`. No media file is opened.

    `subset`: the configuration of a Hub dataset with several. Raises RunError if two rows have the same id, and
    DatasetError if the dataset or the split does not exist, or has no rows.
    """
    dataset = named_splits(name, [split], config=subset)[split]
    for column, suggestion in near_misses(dataset.column_names):
        logger.warning(f"{name}: the column `{column}` is not read. Is it meant to be `{suggestion}`?")
    return Inputs(dataset, row_ids(dataset), media_folder, media_root)


def near_misses(columns: Sequence[str]) -> list[tuple[str, str]]:
    """Return (unread column, absent column with nearly the same name that would be read) pairs."""
    absent = tuple(name for name in COLUMNS if name not in columns)
    bare = {name: re.sub(r"^(pair|group|cluster)_?ids?$", r"\1", name, flags=re.IGNORECASE) for name in columns}
    close = {name: nearest_column(bare[name], absent) for name in columns if name not in COLUMNS}
    return [(name, meant) for name, meant in close.items() if meant]


def row_ids(dataset: Dataset) -> list[str]:
    """Return the unique `id` of every row as a string; a row without one is "row-" and its position in six digits."""
    column = dataset["id"][:] if "id" in dataset.column_names else [None] * len(dataset)
    ids = [f"row-{i:06d}" if name is None or name == "" else str(name) for i, name in enumerate(column)]
    first: dict[str, int] = {}
    for i, name in enumerate(ids):
        if first.setdefault(name, i) != i:
            raise RunError(f"rows {first[name]} and {i} of the inputs both have the id {name!r}. Make them differ.")
    return ids


def hashed(value: Any) -> str:
    return bytes_digest(value) if isinstance(value, BYTES) else str(value)


def digest(rows: Inputs) -> str:
    """Return a fingerprint of ids and contents, in order; media bytes count by their hash, files by their path."""
    total = hashlib.blake2b(digest_size=16)
    for start in range(0, len(rows), CHUNK):
        stop = min(start + CHUNK, len(rows))
        for name, example in zip(rows.ids[start:stop], rows.examples(start, stop)):
            line = json.dumps([name, drop_none(example)], sort_keys=True, default=hashed)
            total.update(line.encode() + b"\n")
    return total.hexdigest()


def load_media(row: InputRow, options: VideoOptions, budget: PixelBudget | None = None) -> Media:
    """Return the decoded media of an input, or raise MediaError. Sampling options next to a video's path win.

    `budget`: of the model that sees them.
    """
    if row.problem:
        raise MediaError(row.problem)
    budget = budget and budget.shared(len(row.videos))
    return Media(
        images=tuple(load_image(source, max_pixels=options.max_pixels) for source in row.images),
        videos=tuple(load_video(source, options, budget=budget) for source in row.videos),
    )


# --- sources ------------------------------------------------------------------------------------------------------


def portable(source: Any, folder: Path | None, media_root: str | Path | None = None) -> Any:
    """Return a media source as JSON can hold it: an absolute path, a list of them, or a dictionary around either.

    Bytes are written to `folder` under their hash; images in memory become PNG files there. A dictionary stays one
    if it has options besides the medium. Raises MediaError for what is not a medium, does not exist, or leaves
    `media_root`, and RunError if `folder` cannot be written.
    """
    if isinstance(source, dict):
        return _portable_dict(source, folder, media_root)
    if isinstance(source, (str, Path)):
        if frame_folder(source, media_root) is None:
            resolve_path(source, media_root)  # raises if it does not exist
        url = str(source)
        path = Path(media_root or ".").absolute() / (unquote(urlsplit(url).path) if url.startswith("file://") else url)
        return str(path.resolve() if ".." in path.parts else path)  # links stay: their targets may have no suffix
    if isinstance(source, BYTES):
        if not len(source):
            raise MediaError(f"{describe(source)} is empty: the row holds no data, write it again.")
        return _stored(bytes(source), folder) if folder else source
    if isinstance(source, (list, tuple)):
        return [portable(frame, folder, media_root) for frame in source]
    if isinstance(source, PIL.Image.Image) and folder:
        png = io.BytesIO()
        load_image(source, limit=False).save(png, "PNG")
        return _stored(png.getvalue(), folder)
    raise MediaError(f"{describe(source)} is neither an image nor a video: give a path, bytes, or a list of frames.")


def _portable_dict(source: dict, folder: Path | None, media_root: str | Path | None) -> Any:
    payload = next((source[key] for key in PAYLOAD if source.get(key) is not None), None)
    if payload is None:
        raise MediaError(f"{describe(source)} names no image or video: give `path` or `bytes`.")
    medium = portable(payload, folder, media_root)
    options = source.keys() - {*PAYLOAD, "type"}
    if not options:  # options that are None here are set in other rows, and all rows have the same keys
        return medium
    if not isinstance(medium, dict):
        key = "path" if isinstance(medium, str) else "bytes" if isinstance(medium, BYTES) else "video"
        medium = {key: medium}
    return medium | {key: value for key, value in source.items() if key in options and value is not None}


def _stored(data: bytes, folder: Path) -> str:
    """Return the path of a file with these contents, written if needed; several workers may write the same one."""
    suffix = next((end for at, magic, end in _MAGIC if data[at : at + len(magic)] == magic), ".bin")
    path = folder / (bytes_digest(data) + suffix)
    if path.exists():
        return str(path)
    try:
        with atomic_write(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}). Free space there or make its folder writable, "
            "then start the same command again."
        ) from error
    return str(path)
