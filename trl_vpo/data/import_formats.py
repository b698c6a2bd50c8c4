"""The formats of other projects: one record of theirs -> one row of the row contract. No files here.

| format | fields read | published in |
| --- | --- | --- |
| rrpo | question, answer, pred, video or media_path; answer_masked, pred_masked, sample_id, src | pritamqu/RRPO |
| lpoi | img_path, prompt, chosen, rejected; id | fatemehpesaran310/lpoi |
| ms-swift | messages, rejected_response or rejected_messages; images, videos, id | modelscope/ms-swift, RLHF JSONL |
| llamafactory | conversations or messages, chosen, rejected; system, images, videos, id | LLaMA-Factory, ShareGPT |
| llava-hound | prompt, chosen, rejected, video; id | ShareGPTVideo sft_dpo_17k.jsonl |

Contents are typed lists everywhere, because one Arrow column cannot hold strings and lists; media are placed as
`trl_vpo.data.messages.place_media` does. Bad records raise a ValueError that names the field and the remedy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trl_vpo.data.messages import MARKERS, place_media, typed_content
from trl_vpo.text.phrases import CLOSE, OPEN, masked_spans

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
REFUSED = ("audios", "tools", "objects")  # they change what the text means


@dataclass(frozen=True)
class Format:
    """The way in which one project writes a pair."""

    read: Callable[[dict], dict]  # record -> row without id and source, media paths as they stand
    fields: frozenset[str]  # all that is looked at; the others are reported
    marks: tuple[frozenset[str], ...] = ()  # fields that only this format has together


def read_record(fmt: str, record) -> dict:
    """Return the row of a record: id (empty if it has none), source, prompt, chosen, rejected, the format's columns.

    Raises ValueError, to which the caller adds file and place.
    """
    for name in REFUSED:
        if record.get(name):
            raise ValueError(f"`{name}` is not supported and would be lost. Remove it if the text does not need it.")
    tags = {key: record.get(key) for key in ("id", "sample_id", "src") if key in FORMATS[fmt].fields}
    row_id = next((tags[key] for key in ("id", "sample_id") if tags.get(key) not in (None, "")), "")
    source = f"{fmt}/{tags['src']}" if tags.get("src") else fmt
    return {"id": str(row_id), "source": source, **FORMATS[fmt].read(record)}


def _rrpo(record: dict) -> dict:
    # "<image>" stands for the video, as in all of LLaVA's data. The format's documentation has `video`, the
    # project's loader reads `media_path`.
    question = _text(record, "question").replace("<image>", "<video>")
    answer, pred = _text(record, "answer"), _text(record, "pred")
    row = _pair([("user", question)], answer, pred, videos=[_text(record, "video", "media_path")])
    masked = record.get("answer_masked"), record.get("pred_masked")
    if not any(tag in text for text in masked if isinstance(text, str) for tag in (OPEN, CLOSE)):
        return row | {"chosen_phrases": None, "rejected_phrases": None}  # a word diff will find them
    for side, plain, name in (("chosen", answer, "answer_masked"), ("rejected", pred, "pred_masked")):
        try:
            row[f"{side}_phrases"] = [list(span) for span in masked_spans(plain, _text(record, name))]
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from error
    if not row["chosen_phrases"] and not row["rejected_phrases"]:
        raise ValueError("`answer_masked` and `pred_masked` mark nothing. Mark what differs, or leave both out.")
    return row


def _flat_pair(record: dict, **media) -> dict:
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    return _pair([("user", _text(record, "prompt"))], chosen, rejected, **media)


def _ms_swift(record: dict) -> dict:
    turns, chosen = _last_turn(record, "messages")
    if record.get("rejected_response") is None and record.get("rejected_messages") is not None:
        others, rejected = _last_turn(record, "rejected_messages")
        if others != turns:
            raise ValueError("`rejected_messages` has another prompt than `messages`; a pair needs the same prompt.")
    else:
        rejected = _text(record, "rejected_response", "rejected_messages")
    media = {"images": _media(record, "images"), "videos": _media(record, "videos")}
    for name, items in media.items():
        if record.get(f"rejected_{name}") and _media(record, f"rejected_{name}") != items:
            raise ValueError(f"`rejected_{name}` differ from `{name}`; a pair needs the same media.")
    return _pair(turns, chosen, rejected, **media)


def _llamafactory(record: dict) -> dict:
    turns = _turns(record, "conversations" if "conversations" in record else "messages")
    if record.get("system") and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", _text(record, "system")))
    sides = []
    for side in ("chosen", "rejected"):
        value = record.get(side)
        sides.append(_turn(value, f"`{side}`")[1] if isinstance(value, dict) else _text(record, side))
    return _pair(turns, *sides, images=_media(record, "images"), videos=_media(record, "videos"))


def _format(read: Callable[[dict], dict], fields: str, *marks: str) -> Format:
    return Format(read, frozenset(fields.split()), tuple(frozenset(names.split()) for names in marks))


FORMATS = {
    "rrpo": _format(
        _rrpo,
        "question answer pred answer_masked pred_masked video media_path sample_id id src",
        "question answer pred",
    ),
    "lpoi": _format(
        lambda record: _flat_pair(record, images=[_text(record, "img_path")]),
        "img_path prompt chosen rejected id",
        "img_path chosen rejected",
    ),
    "ms-swift": _format(
        _ms_swift,
        "messages rejected_response rejected_messages images videos rejected_images rejected_videos id",
        "messages rejected_response",
        "messages rejected_messages",
    ),
    "llamafactory": _format(
        _llamafactory,
        "conversations messages chosen rejected system images videos id",
        "conversations chosen rejected",
        "messages chosen rejected",
    ),
    "llava-hound": _format(
        lambda record: _flat_pair(record, videos=[_text(record, "video")]), "prompt chosen rejected video id"
    ),
}


def _text(record: dict, name: str, other: str | None = None) -> str:
    """Return the text of a required field, or of its other name."""
    name = other if other in record and record.get(name) is None else name
    value = record.get(name)
    if not isinstance(value, str):
        has = "is missing" if value is None else f"is {type(value).__name__}, not text"
        hint = f" (or `{other}`)" if other and value is None else ""
        raise ValueError(f"`{name}`{hint} {has}. The record has the fields {', '.join(map(str, record)) or 'none'}.")
    if not value.strip():
        raise ValueError(f"`{name}` is empty. Fill it in or leave the record out.")
    return value


def _turns(record: dict, name: str) -> list[tuple[str, str]]:
    """Return (role, text) of each message, under either naming: role and content, from and value."""
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` is missing or not a list of messages.")
    empty_system = ({"role": "system", "content": ""}, {"from": "system", "value": ""})  # left by other converters
    return [_turn(m, f"`{name}`[{i}]") for i, m in enumerate(messages) if m not in empty_system]


def _last_turn(record: dict, name: str) -> tuple[list[tuple[str, str]], str]:
    """Return the turns of the prompt and the text of the response behind them."""
    turns = _turns(record, name)
    role, response = turns.pop() if turns else ("nobody", "")
    if role != "assistant":
        raise ValueError(f"`{name}` ends with the {role}'s turn; it must end with the assistant's response.")
    return turns, response


def _turn(message, name: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{name} is not a message with role and content, or from and value.")
    role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} has no text. Write it as one string, with <image> or <video> where media stand.")
    if role not in ROLES:
        raise ValueError(f"{name} has the role {role!r}. Roles: {', '.join(ROLES)}.")
    return ROLES[role], text


def _media(record: dict, name: str) -> list[str]:
    """Return the paths or URLs of a field: one, a list of them, or a list of {"path": ...}."""
    items = record.get(name) or []
    items = [items] if isinstance(items, (str, dict)) else items
    if not isinstance(items, list):
        raise ValueError(f"`{name}` is {type(items).__name__}, not a list of paths.")
    items = [item.get("path") if isinstance(item, dict) and not item.get("bytes") else item for item in items]
    for i, item in enumerate(items):
        if not isinstance(item, str) or not item:
            raise ValueError(f"`{name}`[{i}] is not a path. Write embedded media to files and name those.")
    return items


def _pair(turns: list[tuple[str, str]], chosen: str, rejected: str, **media: list[str]) -> dict:
    """Return a row with typed contents. `media`: the columns that this format can have, with the row's paths."""
    for role, text in [*turns, ("chosen", chosen), ("rejected", rejected)]:
        if role != "user" and any(marker in text for marker in MARKERS):
            raise ValueError(f"<image> or <video> stands in a text that is not the user's ({role}). Move or drop it.")
    if chosen.strip() == rejected.strip():
        raise ValueError(f"the chosen and rejected responses are identical: {chosen.strip()[:80]!r}.")
    if not turns or turns[-1][0] != "user":
        raise ValueError("the prompt does not end with the user's turn, so there is nothing to respond to.")
    prompt = [{"role": role, "content": text} for role, text in turns]
    responses = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": place_media(prompt, len(media.get("images", [])), len(media.get("videos", []))),
        **{side: [{"role": "assistant", "content": typed_content(text, None)}] for side, text in responses.items()},
        **media,
    }
