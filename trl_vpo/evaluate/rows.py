"""The rows of a held-out set, as docs/data.md describes them ("Held-out rows").

One file may mix them; `task` says what a row asks. A yes/no row may say `role` ("basic" for yes, "hallucinated" for
no), which then has to agree with its `answer`. The cluster of a row that names none is its first video or image, as
the row names it, and without media the row itself; yes/no pairs that have one in common are in one together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from trl_vpo.data.inputs import InputRow, given_text
from trl_vpo.data.row_media import LISTS
from trl_vpo.data.rows import Row, read_row, row_name
from trl_vpo.errors import EvaluateError, InputError, RowError
from trl_vpo.files import bytes_digest
from trl_vpo.text.chair import ObjectTable
from trl_vpo.text.choices import read_choice, read_options, right_letters, with_options
from trl_vpo.text.yes_no import yes_or_no

ROLES = {"basic": "yes", "hallucinated": "no"}
MEDIUM = ("bytes", "path", "video", "image")  # keys that hold it in a source with options; the first one counts
SHOWN = 5  # problems in one message


@dataclass(frozen=True)
class EvalRow:
    """A row without its media."""

    place: int  # among the inputs
    id: str
    name: str  # for messages
    task: str  # a key of `TASKS`
    cluster: str  # rows of one cluster are not independent
    facts: dict[str, Any] = field(default_factory=dict)  # what answers are compared with; `rows.jsonl` repeats them


def read_rows(inputs: Sequence[InputRow], table: ObjectTable | None = None, only: str | None = None) -> list[EvalRow]:
    """Check all rows against the contract; raise EvaluateError with what breaks it. No media file is opened.

    Captions need the table of objects. With `only`, rows with another task are passed over.
    """
    rows, problems = [], []
    for place in range(len(inputs)):
        row = inputs[place]
        example, task = {**row.example, "id": row.id}, row.example.get("task", "preference")
        if only not in (None, task):
            continue
        name = row_name(example, place)
        try:
            if str(task) not in TASKS:
                raise RowError(f"`task` is {task!r}: one of {', '.join(TASKS)}; without it, a preference row.")
            facts = TASKS[task](row, table)
            if task != "preference" and (group := _name(row.example.get("group"))):
                facts["group"] = group
            rows.append(EvalRow(place, row.id, name, task, _cluster(row), facts))
        except (RowError, InputError) as error:
            message = str(error).removeprefix(f"{row_name(example)}: ")  # `read_row` does not know the place
            if "task" not in row.example and "question" in row.example:
                message = (
                    f"has a question and no `task`: give one of {', '.join(TASKS)} (without it: preference). {message}"
                )
            problems.append(f"{name}: {message}")
    refuse(problems or _unpaired(rows), len(inputs))
    return rows


def refuse(problems: Sequence[str], count: int, remedy: str = "") -> None:
    """Raise EvaluateError where some of `count` rows have problems, a sentence each."""
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
        more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise EvaluateError(f"{len(problems)} of {count} held-out rows cannot be used:{listed}{more}{remedy}")


def preference_row(row: InputRow) -> Row:
    """Return a preference row in one shape; its list, box or span is checked, too. Raises RowError."""
    ranks = any(row.example.get(key) is not None for key in ("critical_box", "critical_span", *LISTS))
    return read_row({**row.example, "id": row.id}, media_form="ranking" if ranks else None)


# --- the facts of each task, or RowError ----------------------------------------------------------------------------


def _preference(row: InputRow, table: ObjectTable | None) -> dict[str, Any]:
    preference_row(row)
    return {}


def _yes_no(row: InputRow, table: ObjectTable | None) -> dict[str, Any]:
    question, given, role = _question(row), row.example.get("answer"), row.example.get("role")
    answer = yes_or_no(given) if isinstance(given, str) else None
    if answer is None:
        raise RowError(f"`answer` is {given!r}: a yes/no question needs yes or no.")
    if role is not None and ROLES.get(str(role)) != answer:
        raise RowError(f'`role` is {role!r} and `answer` {answer!r}: "basic" goes with yes, "hallucinated" with no.')
    facts = {"question": question, "expected": answer}
    if pair := _name(row.example.get("pair")):
        facts["pair"] = pair
    if (sets := row.example.get("sets")) is not None:
        if not isinstance(sets, dict):
            raise RowError(f'`sets` is {sets!r}: give the id of a set for each kind, such as {{"figure": "3_1"}}.')
        facts["sets"] = {kind: name for kind, given in sets.items() if (name := _name(given))}
    return facts


def _choice(row: InputRow, table: ObjectTable | None) -> dict[str, Any]:
    question, answer = _question(row), row.example.get("answer")
    options = read_options(question, row.example.get("options"))
    letter = read_choice(answer, options).value if options and isinstance(answer, str) else None
    if letter is None:
        letters = ", ".join(options) or "none: there are no options"
        raise RowError(f"`answer` is {answer!r}: give the letter of the right option ({letters}).")
    return {"question": question, "expected": letter, "options": list(options.values())}


def _chair(row: InputRow, table: ObjectTable | None) -> dict[str, Any]:
    question, objects = _question(row), row.example.get("objects")
    if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise RowError(f"`objects` is {objects!r}: list the names of all objects that are there.")
    if table is None:
        raise RowError("asks for a caption, but there is no table of objects: set `synonyms`.")
    try:
        for name in objects:
            table.name(name)
    except ValueError as error:
        raise RowError(str(error)) from error
    return {"question": question, "objects": objects}


def _letters(row: InputRow, table: ObjectTable | None) -> dict[str, Any]:
    question, answer, ordered = _question(row), row.example.get("answer"), row.example.get("ordered", False)
    if not isinstance(ordered, bool):
        raise RowError(f"`ordered` is {ordered!r}: give true where the order of the letters matters, or false.")
    options = read_options(question, row.example.get("options"))
    letters = right_letters(answer, options)
    facts = {"question": with_options(question, options), "letters": "".join(options), "ordered": ordered}
    return facts | {"expected": letters if ordered else "".join(sorted(letters))}


def _rated(row: InputRow, table: ObjectTable | None) -> dict[str, Any]:
    question, answer, contents = _question(row), row.example.get("answer"), row.example.get("contents") or []
    if not isinstance(contents, list) or not all(isinstance(name, str) for name in contents):
        raise RowError(f"`contents` is {contents!r}: list what the image shows, in texts.")
    if not isinstance(answer, str) or not answer.strip():
        raise RowError(f"`answer` is {answer!r}: give a person's answer, which the judge compares.")
    return {"question": question, "reference": answer, "contents": ", ".join(contents)}


TASKS = {
    "preference": _preference,
    "yes_no": _yes_no,
    "choice": _choice,
    "letters": _letters,
    "rated": _rated,
    "chair": _chair,
}


def option_index(facts: dict[str, Any]) -> int:
    """Return the place of the right option of a multiple-choice row, from 0."""
    return ascii_uppercase.index(facts["expected"])


def _question(row: InputRow) -> str:
    given_text(row.example, "question", "its task")
    return row.example["question"]


def _name(given: Any) -> str | None:
    """Return a name as a text; None for an empty one."""
    return None if given in (None, "") else str(given)


def _unpaired(rows: list[EvalRow]) -> list[str]:
    """The problems of pairs of yes/no questions."""
    pairs: dict[str, dict[str, str]] = {}  # pair -> name of a row -> its right answer
    for row in rows:
        if "pair" in row.facts:
            pairs.setdefault(row.facts["pair"], {})[row.name] = row.facts["expected"]
    return [
        f"pair {pair!r} needs one question with yes and one with no; it has "
        f"{', '.join(f'{name}: {answer}' for name, answer in answers.items())}."
        for pair, answers in pairs.items()
        if sorted(answers.values()) != ["no", "yes"]
    ]


def _cluster(row: InputRow) -> str:
    """The row's own cluster, or its first medium as the row names it, so that another `media_root` changes none."""
    if cluster := _name(row.example.get("cluster")):
        return cluster
    columns = (row.example.get(key) for key in ("videos", "video", "images", "image", *LISTS))
    source = next((column for column in columns if column), None)
    while isinstance(source, (dict, list)):  # options beside a path; a list of frames
        if isinstance(source, dict):
            source = [source[key] for key in MEDIUM if source.get(key) is not None]
        source = next(iter(source), None)
    if isinstance(source, bytes):
        return bytes_digest(source)
    return os.path.normpath(source) if isinstance(source, str) else row.id
