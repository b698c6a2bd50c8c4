"""What is asked about easy-vqa's pictures, and pairs of a right and a wrong answer.

Every picture shows one shape in one colour. Its questions are those of easy-vqa ("what color is the triangle?"). A
response is a sentence, so that it has more words than the one that is right or wrong.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.real.model import package_folder

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
WORDS = {"colour": COLOURS, "shape": SHAPES, "yes/no": ("yes", "no")}
SENTENCES = {
    "colour": "The shape in this picture is {}.",
    "shape": "The shape in this picture is a {}.",
    "yes/no": "The answer is {}.",
}


def data_folder() -> Path:
    return package_folder("easy_vqa") / "data"


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """All questions of a split (train, test): picture, file, kind, question, answer."""
    found = []
    for question, answer, picture in json.loads((folder / split / "questions.json").read_text(encoding="utf-8")):
        kind = next(kind for kind, words in WORDS.items() if answer in words)
        file = str(folder / split / "images" / f"{picture}.png")
        row = {"picture": picture, "file": file, "kind": kind, "question": question[:1].upper() + question[1:]}
        found.append(row | {"answer": answer})
    return found


def facts(asked: Sequence[dict[str, Any]]) -> dict[int, dict[str, str]]:
    """Picture -> its colour and shape, as far as questions that are not yes/no tell them."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for row in asked:
        if row["kind"] != "yes/no":
            for word in (*row["question"].strip("?").split(), row["answer"]):
                kind = next((kind for kind in ("colour", "shape") if word in WORDS[kind]), None)
                if kind:
                    found[row["picture"]][kind] = word
    return dict(found)


def majority(asked: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Question -> the answer that it has most often."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in asked:
        counts[row["question"]][row["answer"]] += 1
    return {question: max(sorted(count), key=count.get) for question, count in counts.items()}


def balanced(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Yes/no rows in their order, so many for each question that yes and no are equally often right."""
    sides: dict[str, dict[str, list]] = defaultdict(lambda: {"yes": [], "no": []})
    for place, row in enumerate(asked):
        if row["kind"] == "yes/no":
            sides[row["question"]][row["answer"]].append(place)
    kept = [place for own in sides.values() for both in zip(own["yes"], own["no"]) for place in both]
    return [asked[place] for place in sorted(kept)]


def of_kind(asked: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return balanced(asked) if kind == "yes/no" else [row for row in asked if row["kind"] == kind]


def one_each(asked: Sequence[dict[str, Any]], counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """So many questions of each kind, each about another picture: the first that there are.

    Raises:
        ValueError: too few pictures have one.
    """
    found: dict[int, dict[str, Any]] = {}
    for kind, count in counts.items():
        own = {row["picture"]: row for row in reversed(of_kind(asked, kind)) if row["picture"] not in found}
        if len(own) < count:
            raise ValueError(f"{len(own)} of {count} pictures have a question of the kind {kind}.")
        found |= {picture: own[picture] for picture in sorted(own)[:count]}
    return list(found.values())


def pair(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the right answer and a wrong one of the same kind, drawn by its picture and question."""
    others = [word for word in WORDS[row["kind"]] if word != row["answer"]]
    wrong = random.Random(f"{row['file'].split('/')[-3:]} {row['question']}").choice(others)
    return row | {"wrong": wrong, "chosen": sentence(row, row["answer"]), "rejected": sentence(row, wrong)}


def sentence(row: dict[str, Any], word: str) -> str:
    return SENTENCES[row["kind"]].format(word)


def read_answer(kind: str, text: str) -> str | None:
    """The one word of a kind that an answer has; None if it has none or several."""
    words = {word.strip(".,!?").lower() for word in text.split()} & set(WORDS[kind])
    return words.pop() if len(words) == 1 else None


def is_right(row: dict[str, Any], text: str) -> bool:
    return read_answer(row["kind"], text) == row["answer"]


def others(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row another one of its kind whose picture has another answer: the next in order."""
    found = []
    for place, row in enumerate(rows):
        later = [*rows[place + 1 :], *rows[:place]]
        found.append(next(o for o in later if o["kind"] == row["kind"] and o["answer"] != row["answer"]))
    return found
