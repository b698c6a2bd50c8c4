"""The formats of other projects: one record of theirs -> rows of the row contract, or questions. No files here.

`FORMATS` is the table: what each reads, and where it is published. `format_list` prints it (`trl-vpo import --list`).
What the published code reads: RRPO's train_llavavideo.py, and `RRPODataset` in its videochat2/data.py; lpoi.py of the
LPOI release, which finds the four masked images by their folders; internvl_chat_dpo.py of InternVL for MMPR. What is
documented: LLaMA-Factory's data/README.md, the dataset cards of RLHF-V and RLAIF-V.
"""

import textwrap
from pathlib import PurePosixPath

from trl_vpo.data.import_benchmarks import BENCHMARKS
from trl_vpo.data.import_fields import clip, joined, last_turn, layout, media, pair, single, text, turn, turns
from trl_vpo.data.import_questions import conversations, qa_turns, questions, videochat2_it
from trl_vpo.data.messages import REJECTED
from trl_vpo.text.phrases import CLOSE, OPEN, masked_spans

REFUSED = {"audios", "tools", "objects", "image", "images", "video", "videos"}  # they change what the text means
IDS = ("id", "sample_id", "idx", "qid", "question_id")
SOURCES = ("src", "origin_dataset", "data_source")
MASKED_COPIES = "masked_copies"  # of LPOI's release: paths that the importer looks for
_MASKED = [f"ours_cmask_until_list5/ours_cmask_until{share}" for share in (25, 50, 75, 100)]  # most visible first


def read_record(fmt: str, record) -> list[dict]:
    """Return the rows of a record: id (empty if it has none), source, and the format's columns.

    Raises ValueError, to which the caller adds file and place.
    """
    if unread := [name for name in sorted(REFUSED - FORMATS[fmt].fields) if record.get(name)]:
        raise ValueError(
            f"`{unread[0]}` is not supported and would be lost. Remove it if the text does not need it, or give it "
            f"the name that is read ({FORMATS[fmt].layout})."
        )
    tags = {key: record.get(key) for key in (*IDS, *SOURCES) if key in FORMATS[fmt].fields}
    row_id = next((str(tags[key]) for key in IDS if tags.get(key) not in (None, "")), "")
    origin = next((tags[key] for key in SOURCES if tags.get(key)), None)
    rows = FORMATS[fmt].read(record)
    rows = [rows] if isinstance(rows, dict) else rows
    if not rows:
        raise ValueError(f"the record asks nothing. It needs the fields {FORMATS[fmt].layout}, and each filled.")
    ids = [row_id] if len(rows) == 1 else [f"{row_id}-{n}" if row_id else "" for n in range(1, len(rows) + 1)]
    return [{"id": i, "source": f"{fmt}/{origin}" if origin else fmt, **row} for i, row in zip(ids, rows)]


def format_list(width: int = 80) -> str:
    """Return what `trl-vpo import` reads: for each format its fields and where it is published."""
    lines = ["Fields behind a semicolon are optional; a|b is either.", ""]
    titles = {"pairs": "Preference pairs:", "questions": "Questions for `trl-vpo generate`:"}
    for makes, title in (titles | {"held-out rows": "Benchmarks for `trl-vpo evaluate`:"}).items():
        lines.append(title)
        for name, fmt in FORMATS.items():
            if fmt.makes == makes:
                lines.append(f"  {name}: {fmt.published}")
                lines += textwrap.wrap(fmt.layout, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines).rstrip()


# --- one function for each format of pairs --------------------------------------------------------------------------


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


def _videochat2(record: dict) -> list[dict]:
    """Return a row for each question whose two answers differ."""
    good, bad = qa_turns(record, "QA"), qa_turns(record, "QA_NEG")
    asked = [[joined(entry, "i", "q") for entry in entries] for entries in (good, bad)]
    if asked[0] != asked[1]:
        raise ValueError("`QA_NEG` asks other questions than `QA`; a pair needs the same prompt.")
    answers = [(text(right, "a"), text(wrong, "a")) for right, wrong in zip(good, bad)]
    if all(right.strip() == wrong.strip() for right, wrong in answers):
        raise ValueError("the answers of `QA` and `QA_NEG` are identical.")
    found = zip(asked[0], answers)
    return [pair([("user", q)], *both, **clip(record)) for q, both in found if both[0].strip() != both[1].strip()]


def _flat_pair(record: dict, asked: str = "prompt", **sources) -> dict:
    chosen, rejected = text(record, "chosen"), text(record, "rejected")
    return pair([("user", text(record, asked))], chosen, rejected, **sources)


def _lpoi(record: dict) -> dict:
    image = text(record, "img_path")
    row = _flat_pair(record, images=[image])
    listed = media(record, "image_list")
    if listed in ([], [image]):  # the image alone is no ranking
        folders = list(PurePosixPath(image).parts)
        at = max((i for i, name in enumerate(folders[:-1]) if name == "images"), default=None)
        copies = [] if at is None else [str(PurePosixPath(*folders[:at], m, *folders[at + 1 :])) for m in _MASKED]
        return row | {MASKED_COPIES: copies}
    if image in listed[1:] or len(set(listed)) < len(listed):
        raise ValueError(
            "`img_path` is not the first of `image_list`, or an image is in it twice. It goes from most to least "
            "visible."
        )
    return row | {"image_list": listed if listed[0] == image else [image, *listed]}


def _ms_swift(record: dict) -> dict:
    prompt, chosen = last_turn(record, "messages")
    if record.get("rejected_messages"):
        others, rejected = last_turn(record, "rejected_messages")
        if others != prompt:
            raise ValueError("`rejected_messages` has another prompt than `messages`; a pair needs the same prompt.")
        if record.get("rejected_response") not in (None, "", rejected):
            raise ValueError("`rejected_response` is not the response of `rejected_messages`. Drop the wrong one.")
    elif any(record.get(name) for name in REJECTED) and record.get("rejected_response") is None:
        rejected = None  # the media differ, not the responses
    else:
        rejected = text(record, "rejected_response", "rejected_messages")
    sources = {"images": media(record, "images"), "videos": media(record, "videos")}
    others = {name: items for name in REJECTED if (items := media(record, name))}
    for name, items in others.items():
        own = sources[name.removeprefix("rejected_")]
        if len(items) != len(own):
            raise ValueError(f"`{name}` has {len(items)} items, and `{name.removeprefix('rejected_')}` {len(own)}.")
    if all(items == sources[name.removeprefix("rejected_")] for name, items in others.items()):
        if rejected is None:
            raise ValueError("the rejected media are those of the chosen response, and so is the response.")
        others = {}
    return pair(prompt, chosen, rejected, **sources, **others)


def _llamafactory(record: dict) -> dict:
    """Read either form: ShareGPT's turns, or Alpaca's instruction and input behind a history."""
    if "instruction" in record and not record.get("conversations") and not record.get("messages"):
        prompt = _history(record)
    else:
        if record.get("conversations") and record.get("messages"):
            raise ValueError("the record has both `conversations` and `messages`, of which one is read. Drop one.")
        prompt = turns(record, "conversations" if "conversations" in record else "messages")
    if record.get("system"):
        system = ("system", text(record, "system"))
        if not prompt or prompt[0][0] != "system":
            prompt.insert(0, system)
        elif prompt[0] != system:
            raise ValueError("`system` is not the system's turn that the messages begin with. Drop the wrong one.")
    sides = []
    for side in ("chosen", "rejected"):
        value = record.get(side)
        role, said = turn(value, f"`{side}`") if isinstance(value, dict) else ("assistant", text(record, side))
        if role != "assistant":
            raise ValueError(f"`{side}` is the {role}'s turn; it must be the assistant's (or from gpt).")
        sides.append(said)
    return pair(prompt, *sides, images=media(record, "images"), videos=media(record, "videos"))


def _history(record: dict) -> list[tuple[str, str]]:
    earlier = record.get("history") or []
    if not isinstance(earlier, list) or not all(
        isinstance(said, list) and len(said) == 2 and all(isinstance(t, str) and t.strip() for t in said)
        for said in earlier
    ):
        raise ValueError("`history` is not a list of [instruction, response] texts.")
    prompt = [message for asked, said in earlier for message in (("user", asked), ("assistant", said))]
    return [*prompt, ("user", joined(record, "instruction", "input"))]


def _rlhf_v(record: dict) -> dict:
    """Read RLHF-V, whose three texts are JSON in `text`, and RLAIF-V, which has a column for each."""
    if record.get("text") is not None:
        from trl_vpo.data.json_files import parse_json  # not needed to list the formats

        texts = record["text"]
        try:
            texts = parse_json(texts) if isinstance(texts, str) else texts
        except ValueError as error:
            raise ValueError(f"`text` is not JSON ({error}).") from error
        if not isinstance(texts, dict):
            raise ValueError("`text` is not an object with question, chosen and rejected.")
        record = record | texts
    return _flat_pair(record, "question", images=single(record, "image", "image_path"))


def _elv_halluc_dpo(record: dict) -> dict:
    """Read a caption of one event and the same with what is not there: plain fields, or turns of either naming."""
    names = [name for name in ("video", "videos") if record.get(name)]
    videos = [media(record, name) for name in names]
    if not videos or videos[0] != videos[-1]:
        raise ValueError(f"`video` and `videos` {'differ' if videos else 'are missing'}. Name the video in one.")
    if not any(record.get(name) for name in ("messages", "conversations")):
        sides = text(record, "chosen"), text(record, "rejected", "rejected_response")
        return pair([("user", text(record, "prompt", "question"))], *sides, videos=videos[0])
    record = record | {"videos": videos[0]}
    return _ms_swift(record) if record.get("rejected_response") else _llamafactory(record)


def _symmpo(record: dict) -> dict:
    sides = [text(record, name) for name in ("resp_1_w", "resp_1_l")]
    sources = {"images": single(record, "image_1"), "other_images": single(record, "image_2")}
    return pair([("user", text(record, "question"))], *sides, other_chosen=text(record, "resp_2_w"), **sources)


FORMATS = {
    "rrpo": layout(
        _rrpo,
        "question answer pred video|media_path; answer_masked pred_masked sample_id id src",
        "RRPO, pritamqu/RRPO, docs/DATA.md",
        "question answer pred",
    ),
    "lpoi": layout(
        _lpoi,
        "img_path prompt chosen rejected; image_list id",
        "LPOI, fatemehpesaran310/lpoi",
        "img_path chosen rejected",
    ),
    "ms-swift": layout(
        _ms_swift,
        "messages; rejected_response|rejected_messages images videos rejected_images rejected_videos id",
        "ms-swift, RLHF JSONL",
        "messages rejected_response",
        "messages rejected_messages",
        "messages rejected_images",
        "messages rejected_videos",
    ),
    "llamafactory": layout(
        _llamafactory,
        "conversations|messages|instruction chosen rejected; input history system images videos id",
        "LLaMA-Factory, ShareGPT and Alpaca preference forms",
        "conversations chosen rejected",
        "messages chosen rejected",
        "instruction chosen rejected",
    ),
    "llava-hound": layout(
        lambda record: _flat_pair(record, videos=[text(record, "video")]),
        "prompt chosen rejected video; id",
        "LLaVA-Hound, ShareGPTVideo, sft_dpo_17k.jsonl",
    ),
    "videochat2": layout(
        _videochat2,
        "QA QA_NEG video|image; start end sample_id id",
        "RRPO's data for VideoChat2, pritamqu/self-alignment",
        "QA QA_NEG",
    ),
    "rlhf-v": layout(
        _rlhf_v,
        "text image|image_path; idx origin_dataset question chosen rejected",
        "RLHF-V, openbmb/RLHF-V-Dataset",
        "text image ds_name",
        "text image_path ds_name",
    ),
    "rlaif-v": layout(
        _rlhf_v,
        "question chosen rejected image|image_path; idx origin_dataset text",
        "RLAIF-V, openbmb/RLAIF-V-Dataset",
        "question chosen rejected image ds_name",
        "question chosen rejected image_path ds_name",
    ),
    "mmpr": layout(
        lambda record: _flat_pair(record, "question", images=media(record, "image"), videos=media(record, "video")),
        "question chosen rejected; image video",
        "MMPR, OpenGVLab/MMPR: a .jsonl, or meta.json for all of them",
        "question chosen rejected image",
    ),
    "elv-halluc-dpo": layout(
        _elv_halluc_dpo,
        "video|videos prompt|question|messages|conversations chosen rejected|rejected_response; system id",
        "ELV-Halluc, hlsv02/ELV-Halluc, data/dpo_data.jsonl",
    ),
    "symmpo": layout(
        _symmpo,
        "image_1 image_2 question resp_1_w resp_1_l resp_2_w; id",
        "SymMPO, Liuwq-bit/SymMPO",
        "image_1 image_2 resp_1_w",
    ),
    "llava-hound-qa": layout(
        conversations,
        "conversations video|image; start end id",
        "LLaVA-Hound, ShareGPTVideo, video_instruction/train/qa",
        makes="questions",
    ),
    "llava-video": layout(
        conversations,
        "conversations video|image; start end id data_source",
        "LLaVA-Video-178K, lmms-lab/LLaVA-Video-178K",
        "conversations video",
        makes="questions",
    ),
    "videochat2-it": layout(
        videochat2_it,
        "QA video|image; start end id",
        "VideoChat2-IT, OpenGVLab/VideoChat2-IT",
        "QA video",
        "QA image",
        makes="questions",
    ),
    "questions": layout(
        questions,
        "question answer|answer_index video|image; options|choices|candidates a0 a1 a2 a3 a4 start end id qid",
        "any other; the index of an option counts from 0",
        "question answer video",
        "question answer image",
        makes="questions",
    ),
    **BENCHMARKS,
}
