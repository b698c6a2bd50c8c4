"""Annotated questions of other projects: one record of theirs -> the inputs that `trl-vpo generate` reads.

Sources: the jsonl files of ShareGPTVideo/train_video_and_instruction (video_instruction/train/qa) and the json files
of lmms-lab/LLaVA-Video-178K, both conversations of LLaVA's kind; `ITVidTrainDataset` of OpenGVLab/Ask-Anything
(video_chat2) for VideoChat2-IT. A record with several questions about its video makes an input of each: none of
these projects lets a later question depend on an earlier answer (VideoChat2 shuffles them).
"""

import math
from string import ascii_uppercase

from trl_vpo.data.import_fields import clip, joined, option_index, question, text, turns

OPTIONS = ("options", "choices", "candidates")
NUMBERED = ("a0", "a1", "a2", "a3", "a4")  # of NExT-QA


def conversations(record: dict) -> list[dict]:
    """LLaVA-Hound's QA and LLaVA-Video-178K: `conversations` of human and gpt; `<image>` stands for the video."""
    said = turns(record, "conversations")
    asked, answers = said[::2], said[1::2]
    if len(asked) != len(answers) or {r for r, _ in asked} != {"user"} or {r for r, _ in answers} != {"assistant"}:
        raise ValueError("`conversations` must have a question (human) and its answer (gpt) in turn.")
    media = clip(record)
    return [question(asked, answer, **media) for (_, asked), (_, answer) in zip(asked, answers)]


def videochat2_it(record: dict) -> list[dict]:
    """VideoChat2-IT: `QA` is a list of instruction `i`, question `q`, answer `a`; captions have no question."""
    media = clip(record)
    return [question(joined(turn, "i", "q"), text(turn, "a"), **media) for turn in qa_turns(record, "QA")]


def qa_turns(record: dict, name: str) -> list[dict]:
    """Return the entries of `QA` or `QA_NEG`."""
    entries = record.get(name)
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"`{name}` is missing or not a list of questions with `i`, `q` and `a`.")
    return entries


def questions(record: dict) -> dict:
    """Plain questions: `answer` is a text, a number, or the index of an option, from 0."""
    numbered = [record.get(name) for name in NUMBERED]
    while numbered and numbered[-1] is None:
        numbered.pop()
    if None in numbered:
        raise ValueError(f"`a{numbered.index(None)}` is missing, and `a{len(numbered) - 1}` is there. Fill it in.")
    listed = [value for value in (*map(record.get, OPTIONS), numbered) if value]
    options = listed[0] if listed else None
    if listed:
        if any(other != options for other in listed):
            raise ValueError(f"the record has different lists of options: {listed}. Leave one of them.")
        if not isinstance(options, list) or not all(isinstance(o, (str, int, float)) for o in options):
            raise ValueError(f"the options are {options!r:.80}. Give a list of texts.")
        options = [_number(option) for option in options]
    return question(text(record, "question"), _answer(record, options), options=options, **clip(record))


def _answer(record: dict, options: list[str] | None) -> str:
    """Return the answer as a text; of an index, the text of its option, or the letter if that would be misread."""
    index, answer = record.get("answer_index"), record.get("answer")
    said = None
    if index is None or answer not in (None, ""):
        said = _number(answer) if isinstance(answer, (int, float)) else text(record, "answer")
    if index is None and options and isinstance(answer, (int, float)) and not isinstance(answer, bool):
        if said in options and options.index(said) != answer:
            raise ValueError(
                f"`answer` is {answer}, which is an option and the index of another ({options}). Write it as text, or "
                "its index as `answer_index`."
            )
        index, said = answer, None
    if index is None:
        if said in (options or ()) and option_index(said, record["question"], options) != options.index(said):
            raise ValueError(
                f"`answer` is {said!r}, which is an option and the letter of another ({options}). Give the "
                "index, from 0, as `answer_index`."
            )
        return said
    if not options or isinstance(index, bool) or index not in range(len(options)):
        raise ValueError(f"the answer's index is {index!r}, but the options have {_places(options)}.")
    right = options[int(index)]
    agrees = said in (None, right) or (said == _number(index) and said not in options)
    if not agrees and option_index(said, record["question"], options) != index:
        raise ValueError(f"`answer_index` is {index}, {right!r}, but `answer` is {answer!r}. Drop the wrong one.")
    return right if option_index(right, record["question"], options) == index else ascii_uppercase[int(index)]


def _places(options: list[str] | None) -> str:
    return f"the indices 0 to {len(options) - 1}" if options else "no entries"


def _number(value: str | float) -> str:
    """Return a text; of a number, the way people write it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"an answer or option is {value}, not a number that has digits. Write it as text.")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
