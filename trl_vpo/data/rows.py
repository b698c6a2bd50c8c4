"""The row contract: what a row of preference data may hold. A row that breaks it is refused with a remedy.

The table of docs/data.md has the columns.
"""

import json
import unicodedata
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np

from trl_vpo.data.columns import ASKING, COLUMNS, REF_SUMS, ROW_INDEX, another_layout, misspelt  # noqa: F401
from trl_vpo.data.messages import (
    MARKERS,
    drop_none,
    forgotten_media,
    null_arguments,
    place_media,
    response_text,
    typed_content,
    with_text,
    without_tags,
)
from trl_vpo.data.numbers import row_weight, score_margin
from trl_vpo.data.row_media import MEDIA, Sources, column_list, find_media, has_rejected_media, own_sources
from trl_vpo.errors import PhraseError, RowError
from trl_vpo.text.phrases import CLOSE, Span, phrase_spans

SIDES = ("chosen", "rejected")
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing


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
    media_list: list[Sources] | None = None  # its own media and those that it is compared on, where they are given
    critical_box: list[float] | None = None
    critical_span: list[float] | None = None
    other_chosen: list[dict] | str | None = None
    weight: float = 1.0
    score_margin: float | None = None
    template_kwargs: dict = field(default_factory=dict)
    forgotten: str | None = None  # a marker in the words of a row without media

    @property
    def sides(self) -> tuple[str, ...]:
        """The responses, by the names of their attributes."""
        return SIDES if self.other_chosen is None else (*SIDES, "other_chosen")

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def row_name(example: dict, index: int | None = None) -> str:
    """Return the name of a row in messages: its position, and its id and source where it has them."""
    index = example.get(ROW_INDEX, index)
    name = "row" if index is None else f"row {index}"
    tags = [f"{key} {example[key]!r}" for key in ("id", "source") if example.get(key) is not None]
    return f"{name} ({', '.join(tags)})" if tags else name


def read_row(
    example: dict,
    *,
    phrases: bool | str = False,
    media_form: str | None = None,
    drawn: bool = False,
    scores: str | None = None,
) -> Row:
    """Check an example against the contract and bring it into one shape. No media file is opened.

    `phrases` (RRPO): find the phrases that differ; `<MASK>` tags are taken out of the responses either way. "paired"
    (DPA): as many on both sides. `media_form`: what else a method scores responses behind, see
    `trl_vpo.data.row_media`. `drawn`: where a row gives no second media, the collator draws them. `scores`: require
    `chosen_score` and `rejected_score` ("score"), or `chosen_trust` and `rejected_trust` ("trust").
    """
    name = row_name(example)
    example = {key: value if key in MEDIA else _plain(value) for key, value in example.items()}
    try:
        for column, meant in misspelt(example).items():
            raise RowError(f"has a column `{column}`, which is not read. Did you mean `{meant}`? Rename or drop it.")
        images, videos = own_sources(example)
        contrast = has_rejected_media(example, media_form) or (drawn and bool(images or videos))
        contrast = contrast and media_form == "pair"
        prompt, *responses = _texts(example, alone=contrast, other=media_form == "symmetric")
        row = Row(name, prompt, *responses[:2], images, videos, weight=row_weight(example))
        row.template_kwargs = _template_kwargs(example)
        row.score_margin = score_margin(example, scores) if scores else None
        row.other_chosen = responses[2] if media_form == "symmetric" else None
        if not row.images and not row.videos:
            row.forgotten = forgotten_media(row.prompt)
        find_media(row, example, media_form)
        row.prompt = place_media(row.prompt, len(row.images), len(row.videos), words=True)
        _check_prompt(row)
        if phrases:
            _find_phrases(row, example, paired=phrases == "paired")
        # A lone `<MASK>`, in a row where no tag is closed, is a word (BERT's, say).
        elif any(CLOSE in response_text(getattr(row, side)) for side in row.sides):
            for side in row.sides:
                try:
                    setattr(row, side, without_tags(getattr(row, side)))
                except PhraseError as error:
                    raise RowError(f"the {side} response: {error}") from error
        _check_responses(row, contrast=contrast, drawn=drawn)
    except (RowError, PhraseError) as error:
        raise RowError(f"{name}: {error}") from error
    return row


def _plain(value: Any) -> Any:
    """Return a value without the arrays and scalars of a dataset with NumPy's format."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _texts(example: dict, *, alone: bool, other: bool) -> tuple:
    """Return prompt, chosen and rejected, and with `other` that of the other media.

    The prompt may be implicit in the responses, as TRL allows. `alone`: without `rejected`, it is the chosen response.
    """
    sides = SIDES + ("other_chosen",) * other
    if alone and example.get("rejected") is None:
        if example.get("prompt") is None:
            raise RowError("has neither `prompt` nor `rejected`: nothing tells where the response begins.")
        example = {**example, "rejected": example.get("chosen")}
    for key in sides:
        if example.get(key) is None:
            needed = ", ".join(f"`{name}`" for name in ("prompt", *sides[:-1]))
            raise RowError(f"has no `{key}`. Every row needs {needed} and `{sides[-1]}`. {another_layout(example)}")
    texts = {key: example.get(key) for key in ("prompt", *sides) if example.get(key) is not None}
    for key, text in texts.items():
        _check_type(key, text, example)
    if len({isinstance(text, str) for text in texts.values()}) > 1:
        raise RowError(
            "mixes strings and message lists. Give `prompt`, `chosen` and `rejected` in one form; where the responses "
            "begin with the prompt's turns, leave `prompt` out."
        )
    if "prompt" not in texts:
        if other:
            raise RowError(f"has no `prompt`. {another_layout(example)}")
        texts = _implicit_prompt(texts, example)
    for key, text in texts.items():
        if key != "prompt" and isinstance(text, list) and any(m["role"] not in ("assistant", "tool") for m in text):
            raise RowError(f"`{key}` has a message that is not the assistant's. Move the user's turns into `prompt`.")
    nulls = null_arguments(_template_kwargs(example).get("tools"))
    prompt, *responses = (drop_none(texts[key], nulls) for key in ("prompt", *sides))
    try:
        json.dumps(texts, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RowError("holds half a surrogate pair in its text, which no tokenizer takes. Take it out.") from error
    if not prompt or (isinstance(prompt, str) and not _visible(prompt)):
        raise RowError("has an empty prompt. Give the model a question or an instruction.")
    return prompt, *(_typed_response(side, text) for side, text in zip(sides, responses))


def _check_type(key: str, text: Any, example: dict) -> None:
    """Refuse what is neither a string nor a list of messages."""
    if isinstance(text, str):
        return
    if not isinstance(text, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in text):
        hint = another_layout(example)
        if hasattr(text, "isoformat"):
            hint = "`datasets` took a text for a time: name the file as `dataset_name`, or load it with `features`."
        shown = repr(text)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise RowError(
            f"`{key}` is neither a string nor a list of messages with `role` and `content`, but {shown}. {hint}"
        )
    for message in text:
        if not isinstance(message.get("content"), (str, list, NoneType)):
            raise RowError(
                f"a message of `{key}` has a `content` of the type {type(message['content']).__name__}. Give a string "
                "or a list of parts."
            )


def _implicit_prompt(texts: dict, example: dict) -> dict:
    if not all(texts.values()):
        raise RowError("has no `prompt` and an empty response. Every row needs `prompt`, `chosen` and `rejected`.")
    from trl import extract_prompt

    texts = extract_prompt(texts)
    unlike = [texts[side][0] for side in SIDES if texts[side] and isinstance(texts[side], list)]
    if unlike[:1] != unlike[1:] and any(message["role"] not in ("assistant", "tool") for message in unlike):
        shown = " and ".join(f"{message!r:.120}" for message in unlike)
        raise RowError(
            f"has no `prompt`, and the turns of `chosen` and `rejected` differ before the response: {shown}. Let both "
            "begin with the same prompt, or drop the row."
        )
    asks = [name for name in ASKING if example.get(name)]
    if not texts["prompt"] or (asks and isinstance(texts["prompt"], str)):
        raise RowError(f"has no `prompt`. {another_layout(example)}")
    return texts


def _template_kwargs(example: dict) -> dict:
    kwargs, tools = drop_none(example.get("chat_template_kwargs") or {}), example.get("tools")
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise RowError(f"`chat_template_kwargs` must be a dictionary with names, got {kwargs!r:.80}.")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"`tools` is not JSON ({error}): {tools!r:.80}. Give a list of JSON schemas.") from error
    elif isinstance(tools, list):
        tools = drop_none(tools)  # Arrow gives every parameter to every tool
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"`tools` must be a list of JSON schemas, or that list as JSON, got {tools!r:.80}.")
    return kwargs | ({"tools": tools} if tools else {})


def _check_prompt(row: Row) -> None:
    """Refuse a prompt that ends with a message of nothing, and markers that would stay there as words."""
    if isinstance(row.prompt, str):
        return
    last = row.prompt[-1]
    filled = last["role"] == "tool" or last.get("tool_calls") or any(p["type"] != "text" for p in last["content"])
    if not filled and not _visible(response_text([last])):  # a tool may have nothing to say
        raise RowError(
            f"has an empty prompt: the last message ({last['role']}) says nothing. Give the model a question or an "
            "instruction."
        )
    for marker, kind in MARKERS.items():
        if (row.images or row.videos) and marker in response_text(row.prompt):
            raise RowError(
                f"a text part of the prompt says `{marker}`, which the model would read as words. Take it out: "
                f'{{"type": "{kind}"}} says where media stand, or a `{marker}` in a user\'s plain string.'
            )


def _typed_response(side: str, response: list[dict] | str) -> list[dict] | str:
    """Return a response with typed contents, as the prompt's: the templates of some models know no others."""
    if isinstance(response, str):
        return response
    typed = [{**m, "content": typed_content(m.get("content"), m["role"])} for m in response]
    media = [part["type"] for m in typed for part in m["content"] if part["type"] != "text"]
    if media:
        raise RowError(f"the {side} response holds media ({media[0]}); only the prompt can hold media. Take it out.")
    return typed


def _check_responses(row: Row, *, contrast: bool, drawn: bool) -> None:
    """Refuse empty responses and, unless their media differ, identical ones."""
    differ = contrast and (drawn or row.media_list is not None)
    texts = {side: response_text(getattr(row, side)) for side in row.sides}
    for side, text in texts.items():
        tool_calls = not isinstance(getattr(row, side), str) and any("tool_calls" in m for m in getattr(row, side))
        if not _visible(text) and not tool_calls:
            unseen = ", of characters that show nothing" if text.strip() else ""
            raise RowError(f"the {side} response is empty{unseen}. Drop the row or write a response.")
    pairs = [("rejected", "chosen")] * (not differ) + [("other_chosen", "chosen")] * (row.other_chosen is not None)
    for side, chosen in pairs:
        if getattr(row, side) == row.chosen:
            shown = f"({texts[chosen][:80]!r}){', and so are their media' * contrast}: there is no preference in it."
            raise RowError(f"{chosen} and {side} are identical {shown}")


def _visible(text: str) -> bool:
    """Return True if any character is visible: not white space, of no width, a mark alone or a blank filler."""
    return any(unicodedata.category(c)[0] in "LNPS" and c not in BLANK for c in text)


def _find_phrases(row: Row, example: dict, *, paired: bool) -> None:
    """Fill the phrases and take tags out of the texts."""
    for side in ("chosen", "rejected"):
        response = getattr(row, side)
        if not isinstance(response, str) and len(response) != 1:
            raise RowError(f"`{side}` has {len(response)} messages; phrases need exactly one response message.")
    texts = response_text(row.chosen), response_text(row.rejected)
    given = column_list(example, "chosen_phrases"), column_list(example, "rejected_phrases")
    chosen, rejected, row.chosen_phrases, row.rejected_phrases = phrase_spans(*texts, *given, paired=paired)
    row.chosen, row.rejected = with_text(row.chosen, chosen), with_text(row.rejected, rejected)
