"""Questions of other projects, imported and read by the pipelines that make pairs of them."""

import shutil

import pytest
from helpers import write_clip, write_image
from import_records import QUESTIONS
from run_kit import generate

from trl_vpo.data.importers import convert
from trl_vpo.data.inputs import read_inputs
from trl_vpo.generate.tasks import read_task
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.testbed.tiny_vlm import BASE

# format -> kind, answer and options of each task
TASKS = {
    "llava-hound-qa": [("open", "A red square moves.", {})],
    "llava-video": [
        ("choice", "A.", {"A": "A square", "B": "A circle"}),
        ("open", "It goes to the right.", {}),
    ],
    "videochat2-it": [("choice", "Answer: (A) a square", {"A": "a square", "B": "a circle"})],
    "questions": [("choice", "a circle", {"A": "a square", "B": "a circle"})],
}


@pytest.fixture
def imported(tmp_path):
    """The questions of a format, imported from a file, with media that exist."""

    def import_as(fmt):
        record = QUESTIONS[fmt]
        place = tmp_path / "media" / record["video"]
        if place.suffix:
            place.parent.mkdir(parents=True)
            write_clip(tmp_path / "clip.mp4")
            shutil.move(tmp_path / "clip.mp4", place)  # readers look at contents, not at a name such as .gif
        else:  # LLaVA-Hound's folders of frames
            place.mkdir(parents=True)
            for i in range(3):
                write_image(place / f"{i}.jpg", seed=i)
        source = write_jsonl([record], tmp_path / "in.jsonl")
        counts = convert(fmt, source, tmp_path / "out.jsonl", media_root=tmp_path / "media")
        assert counts.missing_media == []
        return tmp_path / "out.jsonl"

    return import_as


@pytest.mark.parametrize("fmt", TASKS)
def test_imported_questions_are_inputs(imported, tmp_path, fmt, capsys):
    path = imported(fmt)
    rows = list(read_inputs(str(path)))
    assert [row.problem for row in rows] == [None] * len(rows)
    tasks = [read_task(row.example, 3) for row in rows]
    assert [(task.kind, task.answer, dict(task.options)) for task in tasks] == TASKS[fmt]
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    for method in ("leanpo", "rrpo"):
        generate(method, path, tmp_path / method, "--model_name_or_path", tmp_path / "base", "--dry_run")
        out = capsys.readouterr().out
        assert all(row.id in out for row in rows) and "rejected:" not in out
        assert tasks[0].question.splitlines()[0] in out
