"""The study's splits on disk: training pairs (true, flipped, self-made inputs) and held-out rows with their facts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from studies.testbed.plan import digest
from trl_vpo.files import atomic_write
from trl_vpo.testbed import language, rows, world

OTHER = {"clip": "scene", "scene": "clip"}
VALUES = (tuple(world.COLOURS), world.SHAPES, tuple(world.MOTIONS))
STREAMS = {"balanced": 0, "biased": 0, "questions": 10_000, "yes_no": 20_000, "other": 30_000}  # added to the seed


# --- training -----------------------------------------------------------------------------------------------------


def training_rows(data: dict[str, Any], folder: Path) -> Path:
    """The file of a run's preference rows, written unless it is there; see `plan.training_data`.

    `noise` is the share of rows whose responses change places; those of less noise are among those of more.
    """
    path = folder / f"train-{digest(data)}.jsonl"
    if path.is_file():
        return path
    kind, seed, count = data["kind"], data["seed"], data["rows"]
    _, found = rows.write_preferences(kind, count, seed, folder / f"{kind}s-{seed}-{count}")
    noise = data.get("noise", 0.0)
    flipped = np.random.default_rng([seed, 21]).permutation(count)[: round(noise * count)]
    for number in flipped:
        row = found[number]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    if data.get("whole"):
        for row in found:
            for side in ("chosen", "rejected"):
                row[f"{side}_phrases"] = [[0, len(row[side][0]["content"][0]["text"])]]
    return _write(found, path)


def generation_inputs(data: dict[str, Any], method: str, folder: Path) -> Path:
    """The annotated samples of which pairs are made: the same clips or scenes as of `training_rows`."""
    kind, seed, count = data["kind"], data["seed"], data["rows"]
    path = folder / f"inputs-{method}-{kind}-{seed}-{count}.jsonl"
    if path.is_file():
        return path
    found = rows.write_inputs(kind, count, seed, folder / f"{kind}s-inputs-{seed}-{count}")
    if method == "leanpo":  # the base was taught to take hints for captions only
        found = [row for row in found if row["answer_kind"] == "open"]
    return _write(found, path)


# --- held out -----------------------------------------------------------------------------------------------------


def held_out_rows(split: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """The files of a split's rows and of the facts behind them (id -> part, things, answer), written unless there.

    The parts: `balanced` and `biased` captions (without and with the habits that the base grew up with), `questions`
    with a short answer, `yes_no` pairs, and captions of the `other` kind of samples.
    """
    path = folder / f"held-out-{digest(split)}.jsonl"
    facts_path = path.with_suffix(".facts.json")
    if path.is_file() and facts_path.is_file():
        return path, facts_path
    found, facts = [], {}
    for part, count in split["parts"].items():
        made, known = _part(part, split["kind"], split["seed"], count, folder)
        found += made
        facts |= known
    write_text(facts_path, json.dumps(facts))
    return _write(found, path), facts_path


def _part(part: str, kind: str, seed: int, count: int, folder: Path) -> tuple[list[dict], dict[str, dict]]:
    kind = OTHER[kind] if part == "other" else kind
    seed += STREAMS[part]
    samples = world.draw_samples(kind, count, seed, habits=part == "biased")
    rng = np.random.default_rng([seed, 23])
    found, facts = [], {}
    for number, sample in enumerate(samples):
        media = folder / f"{kind}s-{part}-{seed}" / f"{number:04d}{rows.SUFFIXES[kind]}"
        path = media if media.is_file() else world.write_sample(sample, media)
        for row, answer in _asked(part, sample, path, f"{part}-{number:04d}", rng):
            found.append(row)
            things = [[thing.colour, thing.shape, thing.motion] for thing in sample.things]
            facts[row["id"]] = {"part": part, "things": things, "answer": answer}
    return found, facts


def _asked(part: str, sample: world.Sample, path: Path, row_id: str, rng) -> list[tuple[dict, str]]:
    """The rows of a sample, each with the right answer."""
    row = rows.preference_row(sample, path, rng, row_id=row_id) | {"task": "preference"}
    if part == "yes_no":
        media = {key: row[key] for key in ("videos", "images") if key in row}
        pair = zip(("yes", "no"), language.yes_no_pair(sample.things, rng))
        asked = [(f"{row_id}-{side}", item.question, side) for side, item in pair]
        return [
            ({"id": name, "task": part, "question": question, "answer": side, "pair": row_id, **media}, side)
            for name, question, side in asked
        ]
    if part != "balanced":
        row.pop("critical_box", None)  # the ranking of images is measured once
    if part == "questions":
        items = language.open_items(sample.things)
        item = items[rng.integers(len(items))]
        _say(row, item.question, item.answer, _wrong_answer(item.answer, rng))
        return [(row, item.answer)]
    return [(row, language.caption(sample.things))]


def _say(row: dict, question: str, chosen: str, rejected: str) -> None:
    row["prompt"][0]["content"][1]["text"] = question
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        row[side][0]["content"][0]["text"] = text


def _wrong_answer(answer: str, rng) -> str:
    word = answer.rstrip(".")
    others = [value for values in VALUES if word in values for value in values if value != word]
    return f"{others[rng.integers(len(others))]}."


def things_of(facts: dict[str, Any]) -> tuple[world.Thing, ...]:
    return tuple(world.Thing(*thing) for thing in facts["things"])


# --- files --------------------------------------------------------------------------------------------------------


def _write(found: Iterable[dict], path: Path) -> Path:
    with atomic_write(path) as part:
        rows.write_jsonl(found, part)
    return path


def write_text(path: Path, text: str) -> Path:
    """Whole or not at all: a killed run leaves no half of a file under its name."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
