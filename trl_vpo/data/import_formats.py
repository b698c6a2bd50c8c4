"""The formats of other projects: one record of theirs -> one row of the row contract. No files here.

| format | fields read | published in |
| --- | --- | --- |
| rrpo | question, answer, pred, video or media_path; answer_masked, pred_masked, sample_id, src | pritamqu/RRPO |
| lpoi | img_path, prompt, chosen, rejected; id | fatemehpesaran310/lpoi |
| ms-swift | messages, rejected_response or rejected_messages; images, videos, id | modelscope/ms-swift, RLHF JSONL |
| llamafactory | conversations or messages, chosen, rejected; system, images, videos, id | LLaMA-Factory, ShareGPT |
| llava-hound | prompt, chosen, rejected, video; id | ShareGPTVideo sft_dpo_17k.jsonl |

Bad records raise a ValueError that names the field and the remedy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trl_vpo.data.import_fields import last_turn, media, pair, text, turn, turns
from trl_vpo.text.phrases import CLOSE, OPEN, masked_spans

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
    asked = text(record, "question").replace("<image>", "<video>")
    answer, pred = text(record, "answer"), text(record, "pred")
    row = pair([("user", asked)], answer, pred, videos=[text(record, "video", "media_path")])
    masked = record.get("answer_masked"), record.get("pred_masked")
    if not any(tag in said for said in masked if isinstance(said, str) for tag in (OPEN, CLOSE)):
        return row | {"chosen_phrases": None, "rejected_phrases": None}  # a word diff will find them
    for side, plain, name in (("chosen", answer, "answer_masked"), ("rejected", pred, "pred_masked")):
        try:
            row[f"{side}_phrases"] = [list(span) for span in masked_spans(plain, text(record, name))]
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from error
    if not row["chosen_phrases"] and not row["rejected_phrases"]:
        raise ValueError("`answer_masked` and `pred_masked` mark nothing. Mark what differs, or leave both out.")
    return row


def _flat_pair(record: dict, **sources) -> dict:
    chosen, rejected = text(record, "chosen"), text(record, "rejected")
    return pair([("user", text(record, "prompt"))], chosen, rejected, **sources)


def _ms_swift(record: dict) -> dict:
    prompt, chosen = last_turn(record, "messages")
    if record.get("rejected_response") is None and record.get("rejected_messages") is not None:
        others, rejected = last_turn(record, "rejected_messages")
        if others != prompt:
            raise ValueError("`rejected_messages` has another prompt than `messages`; a pair needs the same prompt.")
    else:
        rejected = text(record, "rejected_response", "rejected_messages")
    sources = {"images": media(record, "images"), "videos": media(record, "videos")}
    for name, items in sources.items():
        if record.get(f"rejected_{name}") and media(record, f"rejected_{name}") != items:
            raise ValueError(f"`rejected_{name}` differ from `{name}`; a pair needs the same media.")
    return pair(prompt, chosen, rejected, **sources)


def _llamafactory(record: dict) -> dict:
    prompt = turns(record, "conversations" if "conversations" in record else "messages")
    if record.get("system") and (not prompt or prompt[0][0] != "system"):
        prompt.insert(0, ("system", text(record, "system")))
    sides = []
    for side in ("chosen", "rejected"):
        value = record.get(side)
        sides.append(turn(value, f"`{side}`")[1] if isinstance(value, dict) else text(record, side))
    return pair(prompt, *sides, images=media(record, "images"), videos=media(record, "videos"))


def _format(read: Callable[[dict], dict], fields: str, *marks: str) -> Format:
    return Format(read, frozenset(fields.split()), tuple(frozenset(names.split()) for names in marks))


FORMATS = {
    "rrpo": _format(
        _rrpo,
        "question answer pred answer_masked pred_masked video media_path sample_id id src",
        "question answer pred",
    ),
    "lpoi": _format(
        lambda record: _flat_pair(record, images=[text(record, "img_path")]),
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
        lambda record: _flat_pair(record, videos=[text(record, "video")]), "prompt chosen rejected video id"
    ),
}
