"""The row contract: what a row of preference data may hold, and what a row that breaks it is told.

| column | type | who |
| --- | --- | --- |
| `prompt`, `chosen`, `rejected` | message lists (TRL conversational) or strings | all |
| `videos` (or `video`) | list of: path, `file://` URL, bytes, datasets `Video`, or a list of frames | all |
| `images` (or `image`) | list of: PIL, path, `file://` URL, bytes, datasets `Image` | all |
| `chosen_phrases`, `rejected_phrases` | lists of [start, end) character offsets into the response | RRPO |
| `critical_box` | [x0, y0, x1, y1] pixels in `images[0]`; or `image_list`: images, most visible first | LPOI |
| `id`, `source` | strings, carried into every error message and report | optional |
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trl_vpo.data.phrases import PhraseError, Span, phrase_spans

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "videos",
    "video",
    "images",
    "image",
    "chosen_phrases",
    "rejected_phrases",
    "critical_box",
    "image_list",
    "id",
    "source",
    "tools",
    "chat_template_kwargs",
)
ROW_INDEX = "_row_index"  # added by the trainer, so that a message can name a row that has no id
REF_SUMS = "_ref_sums"  # added by the trainer: precomputed reference log-probs, one for each branch of the row
MARKERS = {"<image>": "image", "<video>": "video"}


class RowError(ValueError):
    """A row that cannot be trained on. The message names the row, what is wrong with it and what to do.

    Built from one string, so that it survives being raised in a data-loader worker.
    """


@dataclass
class Row:
    """A row in one shape, whatever its columns were called. Media are still undecoded sources."""

    name: str
    prompt: list[dict] | str
    chosen: list[dict] | str
    rejected: list[dict] | str
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    chosen_phrases: list[Span] | None = None
    rejected_phrases: list[Span] | None = None
    critical_box: list[float] | None = None
    image_list: list | None = None
    template_kwargs: dict = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def row_name(example: dict, index: int | None = None) -> str:
    """How messages call a row: its position, and its id and source where it has them."""
    index = example.get(ROW_INDEX, index)
    name = "row" if index is None else f"row {index}"
    tags = [f"{key} {example[key]!r}" for key in ("id", "source") if example.get(key) is not None]
    return f"{name} ({', '.join(tags)})" if tags else name


def drop_none(value: Any) -> Any:
    """Without the `None` entries that Arrow adds to dictionaries of different shapes."""
    if isinstance(value, dict):
        return {k: drop_none(v) for k, v in value.items() if v is not None}
    return [drop_none(v) for v in value] if isinstance(value, list) else value


def read_row(example: dict, *, phrases: bool = False, image_list: bool = False) -> Row:
    """Check an example against the contract and bring it into one shape. No media file is opened.

    Args:
        example: the row as the dataset gives it.
        phrases: RRPO: find the phrases that differ (and take `<MASK>` tags out of the responses).
        image_list: LPOI: require `image_list`, or `critical_box` with an image.

    Raises:
        RowError: the row breaks the contract; the message names the row and the remedy.
    """
    name = row_name(example)
    try:
        prompt, chosen, rejected = _texts(example)
        row = Row(
            name=name,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            images=_media(example, "images", "image") or list(example.get("image_list") or [])[:1],
            videos=_media(example, "videos", "video"),
            template_kwargs=_template_kwargs(example),
        )
        row.prompt = place_media(row.prompt, len(row.images), len(row.videos))
        if phrases:
            _find_phrases(row, example)
        _check_responses(row)
        if image_list:
            _find_image_list(row, example)
    except (RowError, PhraseError) as error:
        raise RowError(f"{name}: {error}") from error
    return row


def check_accepted(row: Row, processing_class: Any) -> None:
    """Refuse media that the model cannot see: some processors would drop them without a word.

    Raises:
        RowError: images or videos that the processing class has no processor for.
    """
    name = type(processing_class).__name__
    for kind, items in (("image", row.images), ("video", row.videos)):
        if not items or getattr(processing_class, f"{kind}_processor", None) is not None:
            continue
        if getattr(processing_class, "tokenizer", None) is None:
            raise RowError(
                f"{row.name}: has {kind}s, but {name} is a tokenizer of a text model. Train a vision-language model "
                "with its processor, or drop the media columns."
            )
        raise RowError(
            f"{row.name}: has {kind}s, but {name} takes none. Choose a model that sees {kind}s (the README has a "
            "table), or leave these rows out."
        )


def _texts(example: dict) -> tuple:
    """Prompt, chosen and rejected; the prompt may be implicit in the responses, as TRL allows."""
    for key in ("chosen", "rejected"):
        if example.get(key) is None:
            raise RowError(f"has no `{key}`. Every row needs `prompt`, `chosen` and `rejected`.")
    if example.get("prompt") is None:
        from trl import extract_prompt

        example = extract_prompt({key: example[key] for key in ("chosen", "rejected")})
    texts = [drop_none(example[key]) for key in ("prompt", "chosen", "rejected")]
    if len({isinstance(text, str) for text in texts}) > 1:
        raise RowError("mixes strings and message lists. Give `prompt`, `chosen` and `rejected` in one form.")
    if not texts[0]:
        raise RowError("has an empty prompt. Give the model a question or an instruction.")
    if not isinstance(texts[0], str):
        for key, messages in zip(("prompt", "chosen", "rejected"), texts):
            _check_messages(key, messages)
    return tuple(texts)


def _check_messages(key: str, messages: Any) -> None:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise RowError(f"`{key}` is neither a string nor a list of messages with `role` and `content`.")
    if key != "prompt" and any(m["role"] not in ("assistant", "tool") for m in messages):
        raise RowError(f"`{key}` has a message that is not the assistant's. Move the user's turns into `prompt`.")


def _media(example: dict, plural: str, singular: str) -> list:
    many, one = example.get(plural), example.get(singular)
    if many is not None and one is not None:
        raise RowError(f"has both `{plural}` and `{singular}`. Keep one of them.")
    if many is None:
        return [] if one is None else [one]
    if not isinstance(many, (list, tuple)):
        raise RowError(f"`{plural}` must be a list, got {type(many).__name__}. One item goes into `{singular}`.")
    missing = [i for i, item in enumerate(many) if item is None]
    if missing:
        raise RowError(f"`{plural}` has nothing at position {missing}. Give every item or shorten the list.")
    return list(many)


def _template_kwargs(example: dict) -> dict:
    kwargs = dict(drop_none(example.get("chat_template_kwargs") or {}))
    if example.get("tools"):
        import json

        tools = example["tools"]
        kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return kwargs


# --- placeholders -----------------------------------------------------------------------------------------------


def place_media(prompt: list[dict] | str, images: int, videos: int) -> list[dict] | str:
    """Messages with typed contents, one placeholder for every image and video.

    `<image>` and `<video>` in plain-string contents become placeholders where they stand. If every content is a
    plain string without a marker, the media go in front of the first user message, as in TRL. A prompt that is a
    string is not touched: it carries the model's own placeholder tokens.

    Raises:
        RowError: placeholders and media do not agree in number.
    """
    if isinstance(prompt, str):
        return prompt
    typed = [{**m, "content": _typed(m.get("content"), m["role"])} for m in prompt]
    found = {kind: sum(part["type"] == kind for m in typed for part in m["content"]) for kind in ("image", "video")}
    plain = all(isinstance(m.get("content") or "", str) for m in prompt)
    if plain and not any(found.values()) and (images or videos):
        first = next((m for m in typed if m["role"] == "user"), None)
        if first is None:
            raise RowError("has media but no user message to put them into.")
        first["content"] = [{"type": "image"}] * images + [{"type": "video"}] * videos + first["content"]
        return typed
    for kind, count in (("image", images), ("video", videos)):
        if found[kind] != count:
            raise RowError(
                f"the prompt has {found[kind]} {kind} placeholder(s), but the row has {count} {kind}(s). Put one "
                f'{{"type": "{kind}"}} (or a `<{kind}>` marker) into the prompt for each item of `{kind}s`.'
            )
    return typed


def _typed(content: Any, role: str) -> list[dict]:
    if content is None:
        return []
    if isinstance(content, str):
        return list(_split_markers(content)) if role == "user" else [{"type": "text", "text": content}]
    for part in content:
        if not isinstance(part, dict) or "type" not in part:
            raise RowError(f"a message part is {part!r}; it needs a `type` of text, image or video.")
        if part["type"] in ("image", "video") and set(part) - {"type"}:
            raise RowError(
                f"the prompt carries media inside its message ({part['type']}). Put the source into the "
                f'`{part["type"]}s` column and leave {{"type": "{part["type"]}"}} in the prompt.'
            )
    return [dict(part) for part in content]


def _split_markers(text: str) -> Iterator[dict]:
    """`look at <image> and say` -> text, image, text. The newline that LLaVA data puts after a marker goes too."""
    while text:
        hits = [(text.find(marker), marker) for marker in MARKERS if marker in text]
        if not hits:
            yield {"type": "text", "text": text}
            return
        at, marker = min(hits)
        if text[:at].strip():
            yield {"type": "text", "text": text[:at]}
        yield {"type": MARKERS[marker]}
        text = text[at + len(marker) :].removeprefix("\n")


# --- responses --------------------------------------------------------------------------------------------------


def response_text(response: list[dict] | str) -> str:
    """The plain text of a response: all its text parts, in order."""
    if isinstance(response, str):
        return response
    parts = []
    for message in response:
        content = message.get("content") or ""
        parts += [content] if isinstance(content, str) else [p.get("text", "") for p in content if p["type"] == "text"]
    return "".join(parts)


def with_text(response: list[dict] | str, text: str) -> list[dict] | str:
    """The same response saying `text` (one message only)."""
    return text if isinstance(response, str) else [{**response[0], "content": [{"type": "text", "text": text}]}]


def _check_responses(row: Row) -> None:
    texts = {side: response_text(getattr(row, side)) for side in ("chosen", "rejected")}
    for side, text in texts.items():
        tool_calls = not isinstance(getattr(row, side), str) and any("tool_calls" in m for m in getattr(row, side))
        if not text.strip() and not tool_calls:
            raise RowError(f"the {side} response is empty. Drop the row or write a response.")
    if row.chosen == row.rejected:
        raise RowError(f"chosen and rejected are identical ({texts['chosen'][:80]!r}): there is no preference in it.")
    for side in ("chosen", "rejected"):
        response = getattr(row, side)
        if not isinstance(response, str):  # typed contents, as the prompt's: templates of some models know no others
            setattr(row, side, [{**m, "content": _typed(m.get("content"), m["role"])} for m in response])


def _find_phrases(row: Row, example: dict) -> None:
    """Fill the phrases and take tags out of the texts."""
    for side in ("chosen", "rejected"):
        response = getattr(row, side)
        if not isinstance(response, str) and len(response) != 1:
            raise RowError(f"`{side}` has {len(response)} messages; phrases need exactly one response message.")
    chosen, rejected, row.chosen_phrases, row.rejected_phrases = phrase_spans(
        response_text(row.chosen),
        response_text(row.rejected),
        example.get("chosen_phrases"),
        example.get("rejected_phrases"),
    )
    row.chosen, row.rejected = with_text(row.chosen, chosen), with_text(row.rejected, rejected)


def _find_image_list(row: Row, example: dict) -> None:
    listed, box = example.get("image_list"), example.get("critical_box")
    if row.videos:
        raise RowError("LPOI ranks images, but the row has videos. Train it with LeanPO, RRPO or DPO.")
    if listed is not None:
        if len(listed) < 2:
            raise RowError(f"`image_list` has {len(listed)} image(s); a ranking needs at least two.")
        row.image_list = list(listed)
    elif box is not None:
        row.critical_box = list(box)
    else:
        raise RowError("LPOI needs a `critical_box` [x0, y0, x1, y1] in pixels, or an `image_list`. The row has none.")
    if len(row.images) != 1:
        raise RowError(f"LPOI needs exactly one image in `images`, the row has {len(row.images)}.")
