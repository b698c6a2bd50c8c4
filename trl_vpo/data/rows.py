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

from dataclasses import dataclass, field
from typing import Any

from trl_vpo.data.messages import (
    MARKERS,
    RowError,
    drop_none,
    place_media,
    response_text,
    typed_content,
    with_text,
    without_tags,
)
from trl_vpo.data.phrases import CLOSE, OPEN, PhraseError, Span, phrase_spans

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


def read_row(example: dict, *, phrases: bool = False, image_list: bool = False) -> Row:
    """Check an example against the contract and bring it into one shape. No media file is opened.

    Args:
        example: the row as the dataset gives it.
        phrases: RRPO: find the phrases that differ. `<MASK>` tags are taken out of the responses either way.
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
        _check_markers(row)
        if phrases:
            _find_phrases(row, example)
        else:
            row.chosen, row.rejected = without_tags(row.chosen), without_tags(row.rejected)
        _check_responses(row)
        if image_list:
            _find_image_list(row, example)
    except (RowError, PhraseError) as error:
        raise RowError(f"{name}: {error}") from error
    return row


def check_accepted(row: Row, processing_class: Any) -> None:
    """Refuse media that the model cannot see, which some processors would drop without a word, and misplaced tokens.

    Raises:
        RowError: images or videos that the processing class has no processor for; a string prompt whose placeholder
            tokens do not fit its media; a text with such a token, or a response with an unpaired `<MASK>` tag.
    """
    tokens = {kind: getattr(processing_class, f"{kind}_token", None) for kind in MARKERS.values()}
    try:
        _check_kinds(row, processing_class)
        _check_prompt_tokens(row, tokens)
        _check_response_tokens(row, tokens)
    except RowError as error:
        raise RowError(f"{row.name}: {error}") from error


def _check_kinds(row: Row, processing_class: Any) -> None:
    name = type(processing_class).__name__
    for kind, items in (("image", row.images), ("video", row.videos)):
        if not items or getattr(processing_class, f"{kind}_processor", None) is not None:
            continue
        if getattr(processing_class, "tokenizer", None) is None:
            raise RowError(
                f"has {kind}s, but {name} is a tokenizer of a text model. Train a vision-language model with its "
                "processor, or drop the media columns."
            )
        raise RowError(
            f"has {kind}s, but {name} takes none. Choose a model that sees {kind}s (the README has a table), or leave "
            "these rows out."
        )


def _check_prompt_tokens(row: Row, tokens: dict[str, str | None]) -> None:
    for kind, items in (("image", row.images), ("video", row.videos)):
        token = tokens[kind]
        if row.conversational:
            if token and token in response_text(row.prompt):
                raise RowError(
                    f"the prompt holds {token!r} in its text, the model's own placeholder of {kind}s. Take it out: "
                    f'{{"type": "{kind}"}} says where media stand.'
                )
            continue
        found = row.prompt.count(token) if token else 0
        if found != len(items):
            raise RowError(
                f"the prompt has {found} {kind} placeholder(s) ({token!r}), but the row has {len(items)} {kind}(s). "
                "Put one into the prompt for each, or give the prompt as messages."
            )


def _check_response_tokens(row: Row, tokens: dict[str, str | None]) -> None:
    for side in ("chosen", "rejected"):
        text = response_text(getattr(row, side))
        for kind, token in tokens.items():
            if token and token in text:
                raise RowError(
                    f"the {side} response holds {token!r}, the model's own placeholder of {kind}s; only the prompt "
                    "can hold media. Take it out."
                )
        for tag in (OPEN, CLOSE):
            if tag in text:
                raise RowError(
                    f"the {side} response holds {tag!r} without its partner. Write {OPEN} and {CLOSE} in pairs, not "
                    "nested, around each phrase, or take them out."
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
    return texts[0], *(_typed_response(side, text) for side, text in zip(("chosen", "rejected"), texts[1:]))


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


def _check_markers(row: Row) -> None:
    """Markers that are left in typed texts would stay there, as words beside the real placeholders."""
    text = "" if isinstance(row.prompt, str) or not (row.images or row.videos) else response_text(row.prompt)
    for marker, kind in MARKERS.items():
        if marker in text:
            raise RowError(
                f"a text part of the prompt says `{marker}`, which the model would read as words. Take it out: "
                f'{{"type": "{kind}"}} says where media stand, or a `{marker}` in a user\'s plain string.'
            )


# --- responses --------------------------------------------------------------------------------------------------


def _typed_response(side: str, response: list[dict] | str) -> list[dict] | str:
    """Typed contents, as the prompt's: the templates of some models know no others."""
    if isinstance(response, str):
        return response
    typed = [{**m, "content": typed_content(m.get("content"), m["role"])} for m in response]
    media = [part["type"] for m in typed for part in m["content"] if part["type"] != "text"]
    if media:
        raise RowError(f"the {side} response holds media ({media[0]}); only the prompt can hold media. Take it out.")
    return typed


def _check_responses(row: Row) -> None:
    texts = {side: response_text(getattr(row, side)) for side in ("chosen", "rejected")}
    for side, text in texts.items():
        tool_calls = not isinstance(getattr(row, side), str) and any("tool_calls" in m for m in getattr(row, side))
        if not text.strip() and not tool_calls:
            raise RowError(f"the {side} response is empty. Drop the row or write a response.")
    if row.chosen == row.rejected:
        raise RowError(f"chosen and rejected are identical ({texts['chosen'][:80]!r}): there is no preference in it.")


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
