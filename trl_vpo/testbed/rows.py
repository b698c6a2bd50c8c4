"""Preference data from the small world: media files on disk and rows that follow the project's row contract."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from trl_vpo.testbed import language, world

SUFFIXES = {"clip": ".mp4", "scene": ".png"}


def preference_row(sample: world.Sample, path: Path, rng: np.random.Generator, *, row_id: str) -> dict:
    """Return one row: the true caption is chosen, the typical false caption is rejected.

    A scene's `critical_box` is the box of the thing that the rejected caption gets wrong.
    """
    rejected = language.wrong_caption(sample.things, rng)
    media = {"type": "video" if sample.kind == "clip" else "image"}
    row = {
        "id": row_id,
        "source": f"testbed/{sample.kind}",
        "prompt": [{"role": "user", "content": [media, _text(language.PROMPTS[sample.kind])]}],
        "chosen": [{"role": "assistant", "content": [_text(language.caption(sample.things))]}],
        "rejected": [{"role": "assistant", "content": [_text(rejected)]}],
        f"{media['type']}s": [str(path.resolve())],
    }
    if sample.kind == "scene":
        false = next((t for t in sample.things if t.name not in rejected), sample.things[0])
        row["critical_box"] = list(false.box)
    return row


def caption_row(sample: world.Sample, row: dict) -> dict:
    """Return a held-out row that asks for a caption of a preference row's sample (see `trl_vpo.evaluate.rows`)."""
    media = {name: row[name] for name in ("videos", "images") if name in row}
    asked = {"id": f"{row['id']}-caption", "task": "chair", "question": language.PROMPTS[sample.kind]}
    return asked | {"objects": language.objects_of(sample.things)} | media


def write_preferences(kind: str, count: int, seed: int, folder: Path, *, progress=iter):
    """Draw `count` samples, write their files below `folder` and return (samples, rows).

    `progress` wraps the samples on their way to the disk, for a progress bar.
    """
    samples = world.draw_samples(kind, count, seed, habits=False)
    rng = np.random.default_rng([seed, 7])
    written = _write(progress(samples), folder)
    found = [preference_row(sample, path, rng, row_id=row_id) for sample, path, row_id in written]
    if kind == "scene":
        _add_others(found)
    return samples, found


def _add_others(rows: list[dict]) -> None:
    """Give each row the image and caption of the next one with another caption, for SymMPO."""
    for place, row in enumerate(rows):
        others = (other for other in rows[place + 1 :] + rows[:place] if other["chosen"] != row["chosen"])
        if other := next(others, None):
            row |= {"other_images": other["images"], "other_chosen": other["chosen"]}


def write_inputs(kind: str, count: int, seed: int, folder: Path) -> list[dict]:
    """Draw `count` samples, write their files below `folder` and return inputs for `trl-vpo generate`.

    Of a clip: annotated questions, for `leanpo` and `rrpo`. Of a scene: an ordinary preference row with the boxes of
    its things, for `lpoi`.
    """
    rng = np.random.default_rng([seed, 9])
    inputs = []
    for sample, path, row_id in _write(world.draw_samples(kind, count, seed, habits=False), folder):
        if kind == "clip":
            inputs += _annotated_rows(sample, path, rng, row_id)
        else:
            row = preference_row(sample, path, rng, row_id=row_id)
            del row["critical_box"]
            inputs.append(row | {"objects": [{"label": t.shape, "box": list(t.box)} for t in sample.things]})
    return inputs


def _write(samples: Iterable[world.Sample], folder: Path) -> Iterator[tuple[world.Sample, Path, str]]:
    """Write the samples' files; yield each sample with its path and the id of its row."""
    for number, sample in enumerate(samples):
        name = f"{number:04d}"
        yield sample, world.write_sample(sample, folder / f"{name}{SUFFIXES[sample.kind]}"), f"{folder.name}-{name}"


def _annotated_rows(sample: world.Sample, path: Path, rng: np.random.Generator, row_id: str) -> list[dict]:
    """Return three questions about a clip (caption, short answer, yes or no) with their true answers."""
    questions = language.open_items(sample.things)
    items = [language.caption_item(sample.things), questions[rng.integers(len(questions))]]
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
