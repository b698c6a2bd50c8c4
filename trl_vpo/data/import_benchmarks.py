"""Benchmarks of which the user has a copy: one record of theirs -> held-out rows for `trl-vpo evaluate`.

Fields, prompts and groups are those of the authors' code: RUCAIBox/POPE@3df3ba1; junyangwang0410/AMBER@534babf;
tianyi-lab/HallusionBench@744007c; daniel-cores/tvbench@c354322; Stevetich/EventHallusion@7396e04;
Vid-Halluc/VidHalluc@936fb3c; hlsv02/ELV-Halluc@be7ff84 (its eval.py: the data were not at hand); the Video-MME and
MMHal-Bench files as lmms-eval 0.7.3 and RLHF-V/RLAIF-V@83d917b read them; Object HalBench of the latter. What asks for
the letter of an option, and stands before subtitles, is ours.
"""

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from trl_vpo.data.import_beside import amber_truth, clips, coco_objects, named, spoken, subtitle_folder
from trl_vpo.data.import_fields import Format, clip, layout, media, single, text
from trl_vpo.data.messages import MARKERS
from trl_vpo.errors import ImportFormatError

PLACE = "place"  # of a record in its file, from 0
LETTER = "Answer with the letter of the right option."
SILENT = "The video has no subtitles."
AMBER_GROUPS = {  # type -> dimension
    "discriminative-hallucination": "existence",
    **{f"discriminative-attribute-{kind}": "attribute" for kind in ("state", "number", "action")},
    "discriminative-relation": "relation",
    "relation": "relation",
}
TVBENCH_CUT = ("action_sequence", "action_localization")  # of the others the whole video is shown
SORT = (
    "Sort these two actions in the order they occur in the video, and return the order you detect (i.e., AB or BA). "
    "If you only detect one action of these two in the video, return that action."
)
SCENES = (
    "Watch the given video and determine if a scene change occurs. If no change occurs, respond: 'Scene change: No, "
    "Locations: None'. If there is a scene change, respond in the format: 'Scene change: Yes, Locations: from "
    "[location1] to [location2].'"
)
ELV_SETS = {"ground_truth": ("in_video", "out_video"), "in_video": ("in_video",), "out_video": ("out_video",)}


def held_out(task: str, asked: str, answer: str | None = None, **columns: Any) -> dict:
    """Return a held-out row; markers of media are taken out, and columns without a value left out."""
    if task == "yes_no":
        from trl_vpo.text.yes_no import yes_or_no  # not needed to list the formats

        if (read := yes_or_no(answer)) is None:
            raise ValueError(f"the answer {answer!r} says neither yes nor no.")
        answer = read
    if task == "letters":
        from trl_vpo.text.choices import read_options, right_letters

        right_letters(answer, read_options(asked))
    if not (question := re.sub("|".join(MARKERS), "", asked).strip()):
        raise ValueError("the question has no text. Fill it in or leave the record out.")
    return {k: v for k, v in {"task": task, "question": question, "answer": answer, **columns}.items() if v}


def choice(asked: str, options: list, answer: str, lettered: bool = False, **columns: Any) -> dict:
    """Return a held-out row with the options in its question. The answer is the text of an option.

    `lettered`: the options begin with their letters, and the answer is a letter.
    """
    from trl_vpo.text.choices import read_options  # not needed to list the formats

    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"the options are {options!r:.80}. Give a list of texts.")
    names = options
    if lettered:
        marks = [re.match(r"([A-Z])[.):]\s*", option) for option in options]
        names = [mark and mark[1] for mark in marks]
        if names != [*ascii_uppercase[: len(options)]]:
            raise ValueError(f"the options {options} do not begin with A., B. and so on. Mend their letters.")
        options = [option[mark.end() :] for mark, option in zip(marks, options)]
    if answer not in names:
        raise ValueError(f"the answer {answer!r} is none of the options {names}.")
    lines = [asked, *(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options)), LETTER]
    row = held_out("choice", "\n".join(lines), ascii_uppercase[names.index(answer)], options=options, **columns)
    read_options(row["question"], options)  # or the evaluation would refuse all rows for this one
    return row


# --- one function for each benchmark --------------------------------------------------------------------------------


def _pope(record: dict) -> dict:
    name, about = record["file"], {"images": single(record, "image"), "group": record["file"].rsplit("_", 1)[-1]}
    return held_out("yes_no", text(record, "text"), text(record, "label"), id=f"{name}-{record[PLACE]}", **about)


def _amber(record: dict) -> dict:
    about = record["annotations"].get(str(record.get("id")))
    if about is None or about["type"] not in AMBER_GROUPS:
        raise ValueError(
            f"`id` {record.get('id')!r} is not a discriminative question. Name query_discriminative.json."
        )
    sources = {"images": single(record, "image"), "group": AMBER_GROUPS[about["type"]]}
    return held_out("yes_no", text(record, "query"), about["truth"], **sources)


def _hallusion(record: dict) -> dict:
    """Questions of a set are asked about each of its figures; those of VS also without any, as figure 0."""
    names = ("category", "set_id", "figure_id", "question_id", "visual_input")
    if lost := [name for name in names if record.get(name) in (None, "")]:
        raise ValueError(f"`{lost[0]}` is missing, which tells the set of the question.")
    kind, place, figure, asked, shown = (str(record[name]) for name in names)
    topic = f"{kind}_{text(record, 'subcategory')}_{place}"
    sets = {"question": f"{topic}_q{asked}", "figure": None if kind == "VS" and figure == "0" else f"{topic}_{figure}"}
    given = str(record.get("gt_answer"))
    answer = {"0": "no", "1": "yes"}.get(given, given)
    about = {"images": single(record, "filename") if shown != "0" else [], "group": kind, "sets": sets}
    return held_out("yes_no", text(record, "question"), answer, id=f"{topic}_{figure}_{asked}", **about)


def _tvbench(record: dict) -> dict:
    group, video = record["file"], f"{record['file']}/{text(record, 'video')}"
    window = {name: record.get(name) for name in ("start", "end")} if group in TVBENCH_CUT else {}
    if window and record.get("start") is None:
        raise ValueError(f"`start` is missing; {group} shows a part of the video. Name the authors' file as it is.")
    about = {"id": f"{group}-{record[PLACE]}", "group": group, **clip({"video": video, **window})}
    return choice(text(record, "question"), record.get("candidates"), text(record, "answer"), **about)


def _event_hallusion(record: dict) -> list[dict]:
    name = text(record, "id")
    about = {"videos": [f"{name.rsplit('_', 1)[0]}/{name}.mp4"], "group": name.rsplit("_", 1)[0]}
    return [
        held_out("yes_no", f"{text(asked, 'question')}\nPlease answer yes or no:", text(asked, "answer"), **about)
        for asked in record.get("questions") or []
    ]


def _vidhalluc(record: dict) -> list[dict]:
    """Return the rows of one of its four tasks, told by their fields: BQA, MCQ, TSH and STH."""
    key, value = record["key"], record["value"]
    if not isinstance(value, (dict, list)):
        raise TypeError(f"{value!r:.80}")
    if isinstance(value, list):  # each question about several clips, right where it is for all of them
        if not all(one["a"] for one in value):
            raise ValueError("a question has no clips with answers in `a`. Fill it in or leave it out.")
        return [
            held_out(
                "yes_no", f"{one['q']} Only answer with a single word 'Yes' or 'No'.", answer,
                videos=[f"{clip}.mp4"], group="bqa", cluster=key, sets={"question": f"{key}-{n}"},
            )
            for n, one in enumerate(value)
            for clip, answer in one["a"].items()
        ]  # fmt: skip
    if "Scene change" in value:
        return [held_out("yes_no", SCENES, value["Scene change"], videos=[f"{key}.mp4"], group="sth")]
    if "video" in value or "Question" in value:
        about = {"videos": [f"{text(value, 'video')}.mp4"], "group": "tsh", "ordered": True}
        asked, answer = text(value, "Question"), text(value, "Correct Answer")
        return [held_out("letters", asked + SORT, _letters(answer, "AB"), **about)]
    lines = (
        " Please select the correct answer (one or more options), only return your answer(s). (e.g., ABCD)\nChoices:"
    )
    return [
        held_out(
            "letters", "\n".join([one["Question"] + lines, *(f"{k}. {v}" for k, v in one["Choices"].items())]),
            _letters(one["Correct Answer"], one["Choices"]), videos=[f"{clip}.mp4"], group="mcq", cluster=key,
        )
        for clip, one in value.items()
    ]  # fmt: skip


def _letters(answer: str, choices: Collection[str]) -> str:
    """Return the letters of an answer such as `BD` or `B, D`, which are among the choices."""
    letters = re.sub(r"[\s,.;&]|\band\b", "", answer)
    if not letters or not set(letters) <= set(choices):
        raise ValueError(f"the answer {answer!r} is not letters of the choices, {', '.join(choices)}. Write those.")
    return letters


def _elv_halluc(record: dict) -> dict:
    """Three captions of an event stand behind each other: true, with what comes elsewhere, with what never comes."""
    kind, triplet, due = text(record, "caption_type"), str(record[PLACE] // 3), [*ELV_SETS][record[PLACE] % 3]
    if kind not in ELV_SETS:
        raise ValueError(f"`caption_type` is {kind!r}: it is one of {', '.join(ELV_SETS)}.")
    if kind != due:  # nothing else tells which captions belong together
        raise ValueError(f"`caption_type` is {kind}, and {due} is due: a line before it was lost or moved.")
    video, together = single(record, "video"), record["clips"][record[PLACE] // 3 * 3 :][:3]
    if len(together) < 3:
        raise ValueError("the file ends before the three captions of its event do. Fetch it again.")
    if others := [other for other in together if other not in (None, record["video"])]:
        raise ValueError(f"it is about {record['video']}, and one beside it about {others[0]}: lines were lost.")
    sets = {name: triplet if name in ELV_SETS[kind] else None for name in ("in_video", "out_video")}
    about = {"id": f"{triplet}-{kind}", "videos": video, "group": record.get("aspect"), "sets": sets}
    return held_out("yes_no", text(record, "question"), text(record, "ref_answer"), **about)


def _video_mme(record: dict, subtitles: bool = False) -> dict:
    name, asked = text(record, "videoID"), text(record, "question")
    if subtitles:
        said = name in record["subtitles"] and spoken(record["subtitles"][name])
        asked = "\n".join(["The subtitles of the video:", said] if said else [SILENT]) + f"\n\n{asked}"
    about = {"videos": [f"{name}.mp4"], "group": record.get("duration")}
    return choice(asked, record.get("options"), text(record, "answer"), lettered=True, **about)


def _mmhal(record: dict) -> dict:
    picture = media(record, "image") or [text(record, "image_src").rsplit("/", 1)[-1]]
    about = {"images": picture, "contents": record.get("image_content"), "group": record.get("question_type")}
    return held_out("rated", text(record, "question"), text(record, "gt_answer"), id=str(record[PLACE]), **about)


def _object_halbench(record: dict) -> dict:
    picture, number = single(record, "image", "image_path"), record.get("image_id")
    if not re.fullmatch(r"\d+(\.0)?", str(number)):
        raise ValueError(f"`image_id` is {number!r}, not a whole number of COCO.")
    number = int(float(number))
    row = held_out("chair", text(record, "question"), id=f"{number}-{record[PLACE]}", images=picture)
    return row | {"objects": sorted(record["coco"](number))}


# --- the table -------------------------------------------------------------------------------------------------------

LAYOUT = (KeyError, TypeError, AttributeError)  # what reading another one raises


def _strictly(read: Callable, given: dict | Path) -> Any:
    """Read a record, or what lies beside a file. Another layout is an error that says so."""
    try:
        return read(given)
    except LAYOUT as error:
        lost = isinstance(error, KeyError)
        reason = f"`{error.args[0]}` is missing" if lost else f"a value is not of the kind that is read: {error}"
        if isinstance(given, Path):
            raise ImportFormatError(
                f"{given}: what lies beside it has another layout ({reason}). Put the authors' files there."
            ) from error
        raise ValueError(f"the record has another layout ({reason}). Name the authors' file as it is.") from error


def _held_out(
    read: Callable, fields: str, published: str, *marks: str, beside: Callable[[Path], dict] = named, **options: Any
) -> Format:
    """Return a benchmark's format."""
    options |= {"makes": "held-out rows", "beside": partial(_strictly, beside)}
    return layout(partial(_strictly, read), fields, published, *marks, **options)


BENCHMARKS: dict[str, Format] = {
    "pope": _held_out(
        _pope, "text label image", "POPE, RUCAIBox/POPE, output/coco", "text label image", folder="*_pope_*.json"
    ),
    "amber": _held_out(
        _amber, "id query image", "AMBER, junyangwang0410/AMBER, data/query", "id query image",
        beside=amber_truth, folder="query_discriminative.json",
    ),
    "hallusionbench": _held_out(
        _hallusion,
        "category subcategory set_id figure_id question_id visual_input question gt_answer filename",
        "HallusionBench, tianyi-lab, HallusionBench.json",
        "set_id figure_id question_id visual_input gt_answer",
    ),
    "tvbench": _held_out(
        _tvbench, "question candidates answer video; start end", "TVBench, FunAILab/TVBench, json/",
        "question candidates answer video", folder="*.json",
    ),
    "eventhallusion": _held_out(
        _event_hallusion, "id questions", "EventHallusion, Stevetich/EventHallusion, questions/",
        "id questions", folder="*_questions.json",
    ),
    "vidhalluc": _held_out(
        _vidhalluc, "key value",
        "VidHalluc, Vid-Halluc/VidHalluc: JSON of each task, clips together",
        keyed=True, folder="*.json",
    ),
    "elv-halluc": _held_out(
        _elv_halluc, "video question ref_answer caption_type; aspect",
        "ELV-Halluc, hlsv02/ELV-Halluc, data/ELV_Halluc.jsonl", "question ref_answer caption_type", beside=clips,
    ),
    "video-mme": _held_out(
        _video_mme, "videoID question options answer; question_id duration", "Video-MME, lmms-lab/Video-MME, .parquet",
        "videoID question options answer", folder="*.parquet",
    ),
    "video-mme-subtitles": _held_out(
        partial(_video_mme, subtitles=True),
        "videoID question options answer; question_id duration",
        "the same with subtitle/*.srt in the prompts",
        beside=subtitle_folder, folder="*.parquet",
    ),
    "mmhal-bench": _held_out(
        _mmhal, "question gt_answer image|image_src; image_content question_type",
        "MMHal-Bench, Shengcao1006/MMHal-Bench", "question gt_answer image_content",
    ),
    "object-halbench": _held_out(
        _object_halbench,
        "question image_id image|image_path",
        "Object HalBench, RLHF-V/RLAIF-V, eval/data, and COCO",
        beside=coco_objects,
    ),
}  # fmt: skip
