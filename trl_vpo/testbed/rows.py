"""Preference data from the small world: media files on disk and rows that follow the project's row contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from trl_vpo.files import atomic_write
from trl_vpo.testbed import language, world
from trl_vpo.text.phrases import word_diff

SUFFIXES = {"clip": ".mp4", "scene": ".png"}


def preference_row(
    sample: world.Sample,
    path: Path,
    rng: np.random.Generator,
    *,
    row_id: str,
    reworded: bool = False,
    boxed: bool = False,
) -> dict:
    """Return one row: a true caption is chosen, the same with one fact wrong is rejected, `reworded` if asked.

    Where no words stand in the place of others, so that DPA finds no pairs of phrases, the row has some: where words
    have only moved (events in a wrong order), those that RRPO finds; where a sentence is invented, that sentence and
    the true one in its place.

    A scene's `critical_box` is that of the thing whose fact is wrong, or beside which something is invented. With
    `boxed` a clip has one too: the thing's whole lane, in which it moves.
    """
    wording, other = language.draw_wording(rng), language.draw_wording(rng)
    wrong, thing = language.one_fact_wrong(sample.things, rng)
    chosen = language.caption(sample.things, wording)
    rejected = language.caption(wrong, other if reworded else wording)
    media = {"type": "video" if sample.kind == "clip" else "image"}
    row = {
        "id": row_id,
        "prompt": [{"role": "user", "content": [media, _text(language.PROMPTS[sample.kind])]}],
        "chosen": [{"role": "assistant", "content": [_text(chosen)]}],
        "rejected": [{"role": "assistant", "content": [_text(rejected)]}],
        f"{media['type']}s": [str(path.resolve())],
    }
    if not any(word_diff(chosen, rejected, replaced=True)):
        moved = word_diff(chosen, rejected)
        marked = map(list, moved) if all(moved) else _first_sentences_that_differ(chosen, rejected)
        row["chosen_phrases"], row["rejected_phrases"] = marked
    if sample.kind == "scene":
        row["critical_box"] = list(thing.box)
    elif boxed:
        row["critical_box"] = [thing.place * world.LANE, 0, (thing.place + 1) * world.LANE, world.HEIGHT]
    return row


def _first_sentences_that_differ(*captions: str) -> list[list[list[int]]]:
    """Return the spans of one sentence in each of two captions."""
    split = [caption.split(". ") for caption in captions]
    same = next(number for number, pair in enumerate(zip(*split)) if pair[0] != pair[1])
    start = sum(len(sentence) + len(". ") for sentence in split[0][:same])
    return [[[start, start + len(sentences[same])]] for sentences in split]


def caption_row(sample: world.Sample, row: dict) -> dict:
    """Return a held-out row that asks for a caption of a preference row's sample (see docs/data.md)."""
    media = {name: row[name] for name in ("videos", "images") if name in row}
    asked = {"id": f"{row['id']}-caption", "task": "chair", "question": language.PROMPTS[sample.kind]}
    return asked | {"objects": language.objects_of(sample.things)} | media


def write_preferences(kind: str, count: int, seed: int, folder: Path, *, progress=iter):
    """Draw `count` samples, write their files below `folder` and return (samples, rows).

    `progress` wraps the samples on their way to the disk, for a progress bar.
    """
    samples = world.draw_samples(kind, count, seed, habits=False)
    found = write_rows(progress(samples), seed, folder)
    if kind == "scene":
        _add_others(found)
    return samples, [row | {"source": f"testbed/{kind}"} for row in found]


def write_rows(
    samples: Iterable[world.Sample], seed: int, folder: Path, *, keep: bool = False, **options
) -> list[dict]:
    """Write the files of samples, or `keep` those that are there, and return a `preference_row` for each."""
    rng, written = np.random.default_rng([seed, 7]), _write(samples, folder, keep)
    return [preference_row(sample, path, rng, row_id=row_id, **options) for sample, path, row_id in written]


def _add_others(rows: list[dict]) -> None:
    """Give each row the image and caption of the next one with another caption, for SymMPO."""
    for place, row in enumerate(rows):
        others = (other for other in rows[place + 1 :] + rows[:place] if other["chosen"] != row["chosen"])
        if other := next(others, None):
            row |= {"other_images": other["images"], "other_chosen": other["chosen"]}


def write_inputs(kind: str, count: int, seed: int, folder: Path, *, keep: bool = False) -> list[dict]:
    """Draw `count` samples, write their files below `folder` and return inputs for `trl-vpo generate`.

    Of a clip: annotated questions, for `leanpo` and `rrpo`. Of a scene: an ordinary preference row with the boxes of
    its things, for `lpoi`.
    """
    rng = np.random.default_rng([seed, 9])
    inputs = []
    for sample, path, row_id in _write(world.draw_samples(kind, count, seed, habits=False), folder, keep):
        if kind == "clip":
            inputs += _annotated_rows(sample, path, rng, row_id)
        else:
            row = preference_row(sample, path, rng, row_id=row_id)
            del row["critical_box"]
            objects = [{"label": thing.shape, "box": list(thing.box)} for thing in sample.things]
            inputs.append(row | {"source": f"testbed/{kind}", "objects": objects})
    return inputs


def _write(
    samples: Iterable[world.Sample], folder: Path, keep: bool = False
) -> Iterator[tuple[world.Sample, Path, str]]:
    """Write the samples' files; yield each sample with its path and the id of its row."""
    for number, sample in enumerate(samples):
        path = folder / f"{number:04d}{SUFFIXES[sample.kind]}"
        if not (keep and path.is_file()):
            world.write_sample(sample, path)
        yield sample, path, f"{folder.name}-{path.stem}"


def _annotated_rows(sample: world.Sample, path: Path, rng: np.random.Generator, row_id: str) -> list[dict]:
    """Return three questions about a clip (caption, short answer, yes or no) with their true answers."""
    questions = language.open_items(sample.things)
    caption = language.caption(sample.things, language.draw_wording(rng))
    items = [language.Item("caption", language.PROMPTS["clip"], caption), questions[rng.integers(len(questions))]]
    items.append(language.yes_no_pair(sample.things, rng)[rng.integers(2)])
    return [
        {
            "id": f"{row_id}-{item.kind}",
            "source": f"testbed/{sample.kind}",
            "video": str(path.resolve()),
            "question": item.question,
            "answer": item.answer,
            "answer_kind": {"caption": "open", "open": "short", "yes_no": "yes_no"}[item.kind],
        }
        for item in items
    ]


def write_jsonl(rows: Iterable[dict], path: Path) -> Path:
    """Write rows, whole or not at all: a file that is there is taken for complete."""
    with atomic_write(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
