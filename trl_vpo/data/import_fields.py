"""The parts of other projects' records: texts, turns, media, and the rows that they make. No files here.

A function raises ValueError, which names the field and the remedy. Contents are typed lists everywhere, because one
Arrow column cannot hold strings and lists; media are placed as `trl_vpo.data.messages.place_media` does.
"""

import base64
import binascii
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_vpo.data.messages import MARKERS, place_media, typed_content

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
EMPTY_SYSTEM = ({"role": "system", "content": ""}, {"from": "system", "value": ""})  # left by other converters
_DATA_URL = re.compile(r"data:[\w.+/-]+;base64,")
_PICTURE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/]{250}")  # base64 of JPEG, PNG, GIF, WebP


@dataclass(frozen=True)
class Format:
    """The way in which one project writes a pair, a question, or an item of a benchmark."""

    read: Callable[[dict], dict | list[dict]]  # record -> rows without id and source, media as they stand
    layout: str  # the fields that are looked at, as `--list` shows them; what is optional behind a semicolon
    published: str
    marks: tuple[frozenset[str], ...] = ()  # fields that only this format has together
    makes: str = "pairs"
    folder: str = ""  # the files that are read of a folder
    keyed: bool = False  # the records stand by keys in one JSON object
    beside: Callable[[Path], dict] = lambda path: {}  # a file -> fields that it adds to each of its records

    @property
    def fields(self) -> frozenset[str]:
        """All fields that are looked at. The others are reported."""
        return frozenset(re.findall(r"\w+", self.layout))


def layout(read: Callable, fields: str, published: str, *marks: str, **options: Any) -> Format:
    return Format(read, fields, published, tuple(frozenset(names.split()) for names in marks), **options)


# --- texts ----------------------------------------------------------------------------------------------------------


def text(record: dict, name: str, other: str | None = None) -> str:
    """Return the text of a required field, or of its other name; with both, they must be the same."""
    if other and record.get(name) and record.get(other) and record[name] != record[other]:
        raise ValueError(f"`{name}` and `{other}` differ, and one of them is read. Leave the right one.")
    name = other if other in record and record.get(name) is None else name
    value = record.get(name)
    if not isinstance(value, str):
        has = "is missing" if value is None else f"is {type(value).__name__}; write it as text"
        hint = f" (or `{other}`)" if other and value is None else ""
        raise ValueError(f"`{name}`{hint} {has}. The record has the fields {', '.join(map(str, record)) or 'none'}.")
    if not value.strip():
        raise ValueError(f"`{name}` is empty. Fill it in or leave the record out.")
    return value


def joined(record: dict, *names: str) -> str:
    """Return the texts of the fields that are filled, a line each; at least one must be."""
    lines = [text(record, name) for name in names if record.get(name) not in (None, "")]
    return "\n".join(lines) if lines else text(record, names[-1])


def turns(record: dict, name: str) -> list[tuple[str, str]]:
    """Return (role, text) of each message, under either naming: role and content, from and value."""
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` is missing or not a list of messages.")
    return [turn(m, f"`{name}`[{i}]") for i, m in enumerate(messages) if m not in EMPTY_SYSTEM]


def last_turn(record: dict, name: str) -> tuple[list[tuple[str, str]], str]:
    """Return the turns of the prompt and the text of the response behind them."""
    prompt = turns(record, name)
    role, response = prompt.pop() if prompt else ("nobody", "")
    if role != "assistant":
        raise ValueError(f"`{name}` ends with the {role}'s turn; it must end with the assistant's response.")
    return prompt, response


def turn(message, name: str) -> tuple[str, str]:
    """Return (role, text) of a message; `name` is where it stands."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} is not a message with role and content, or from and value.")
    role, value = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} has no text. Write it as one string, with <image> or <video> where media stand.")
    if role not in ROLES:
        raise ValueError(f"{name} has the role {role!r}. Roles: {', '.join(ROLES)}.")
    return ROLES[role], value


# --- media ----------------------------------------------------------------------------------------------------------


def media(record: dict, name: str) -> list[str | bytes]:
    """Return the paths or URLs of a field, and the bytes of embedded media.

    The field holds one of these or a list of them: a path, a URL, bytes, {"path": ...}, {"bytes": ...}. Bytes are
    base64 where JSON holds them.
    """
    items = record.get(name)
    items = [] if items in (None, "", b"", {}) else items if isinstance(items, list) else [items]
    return [_source(item, f"`{name}`[{i}]", picture="image" in name) for i, item in enumerate(items)]


def single(record: dict, name: str, other: str | None = None) -> list[str | bytes]:
    """Return the one medium of a field, or of its other name where the field is empty."""
    items = media(record, name) or (media(record, other) if other else [])
    if len(items) != 1:
        hint, kind = f" (or `{other}`)" if other else "", "videos" if "video" in name else "images"
        raise ValueError(f"`{name}`{hint} has {len(items)} {kind}; a record has one.")
    return items


def clip(record: dict) -> dict[str, list]:
    """Return the `videos` or `images` of a record with `video` or `image`; `start` and `end` (seconds) cut a video."""
    videos, images, start, end = media(record, "video"), media(record, "image"), record.get("start"), record.get("end")
    if bool(videos) == bool(images):
        has = "both `video` and `image`" if videos else "neither a video nor an image to ask about"
        raise ValueError(f"the record has {has}. Give it one of them.")
    if images:
        return {"images": images}
    if start is None and end is None:
        return {"videos": videos}
    seconds = all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in (start, end))
    if len(videos) != 1 or not isinstance(videos[0], str) or not seconds or not 0 <= start < end < 1e9:  # nan is none
        raise ValueError(
            f"`start` {start!r} and `end` {end!r} must be seconds of the one path in `video`, from 0 on, and the end "
            "must come later."
        )
    return {"videos": [{"path": videos[0], "video_start": float(start), "video_end": float(end)}]}


def _source(item: Any, where: str, picture: bool) -> str | bytes:
    if isinstance(item, dict):
        data = item.get("bytes")
        item = item.get("path") if not data else _decoded(data) if isinstance(data, str) else data
    elif isinstance(item, str) and (_DATA_URL.match(item) or _PICTURE.match(item)):
        item = _decoded(_DATA_URL.sub("", item, count=1))
    if isinstance(item, bytes) and item and (not picture or _is_picture(item)):
        return item
    if isinstance(item, str) and item:
        return item
    if isinstance(item, (int, float)):
        raise ValueError(f"{where} is {item}, no path. Write the name of a file as text.")
    raise ValueError(f"{where} is not a path, and not the bytes of a medium. Write it to a file and name that.")


def _decoded(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _is_picture(data: bytes) -> bool:
    from PIL import Image  # not needed to list the formats

    try:
        Image.open(io.BytesIO(data)).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


# --- rows -----------------------------------------------------------------------------------------------------------


def pair(
    prompt: list[tuple[str, str]],
    chosen: str,
    rejected: str | None,
    *,
    other_chosen: str | None = None,
    **sources: list,
) -> dict:
    """Return a row with typed contents. `sources`: the columns that this format can have, with the row's sources.

    `rejected`: None where the rejected media are compared under the chosen response.
    """
    responses = {"chosen": chosen, "rejected": rejected, "other_chosen": other_chosen}
    responses = {side: said for side, said in responses.items() if said is not None}
    for role, said in [*prompt, *responses.items()]:
        if role != "user" and any(marker in said for marker in MARKERS):
            raise ValueError(f"<image> or <video> stands in a text that is not the user's ({role}). Move or drop it.")
    for side in responses.keys() - {"chosen"}:
        if chosen.strip() == responses[side].strip():
            raise ValueError(f"the chosen and {side} responses are identical: {chosen.strip()[:80]!r}.")
    if not prompt or prompt[-1][0] != "user":
        raise ValueError("the prompt does not end with the user's turn, so there is nothing to respond to.")
    messages = [{"role": role, "content": said} for role, said in prompt]
    return {
        "prompt": place_media(messages, len(sources.get("images", [])), len(sources.get("videos", []))),
        **{side: [{"role": "assistant", "content": typed_content(said, None)}] for side, said in responses.items()},
        **sources,
    }


def question(asked: str, answer: str, **columns) -> dict:
    """Return an annotated question. Markers of media are taken out: generation puts the media in front.

    `columns`: `images`, `videos` and `options`; empty ones are left out. Options, also those that the question lists,
    must be different, and the answer must name one of the column's.
    """
    plain = [re.sub("|".join(MARKERS), "", value).strip() for value in (asked, answer)]
    for name, value in zip(("question", "answer"), plain):
        if not value:
            raise ValueError(f"the {name} has no text. Fill it in or leave the record out.")
    row = {"question": plain[0], "answer": plain[1], **{name: items for name, items in columns.items() if items}}
    options = columns.get("options")
    if option_index(row["answer"], row["question"], options) is None and options:
        raise ValueError(
            f"the answer {row['answer']!r} is none of the options {options}. Write the text or the letter of one, or "
            "its index as a number, from 0."
        )
    return row


def option_index(answer: str, asked: str, options: list[str] | None) -> int | None:
    """Return which option generation reads of an answer; None if none. Raise for options that are alike."""
    from trl_vpo.text.choices import read_choice, read_options  # not needed to list the formats

    letters = read_options(asked, options)  # those of the question without a list of them
    named = read_choice(answer, letters).value if options else None
    return named and [*letters].index(named)
