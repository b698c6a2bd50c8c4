"""Annotated questions of other projects as inputs of generation, and the list of all formats."""

import json
import math
import re

import pytest
from import_records import HOUND_QA, LLAVA_VIDEO, NEXT_QA, QUESTIONS, RECORDS, VIDEOCHAT2_IT, import_rows

from trl_vpo.data.import_formats import FORMATS, format_list
from trl_vpo.data.importers import convert
from trl_vpo.data.inputs import read_inputs
from trl_vpo.errors import ImportFormatError
from trl_vpo.testbed.rows import write_jsonl


def questions(tmp_path, fmt, record, **options):
    rows = import_rows(fmt, write_jsonl([record], tmp_path / "in.jsonl"), **options)
    return [{key: value for key, value in row.items() if key not in ("id", "source")} for row in rows]


def test_conversations_give_a_question_for_each_answer(tmp_path):
    video = ["/data/academic_source/101.mp4"]
    assert questions(tmp_path, "llava-video", LLAVA_VIDEO, media_root="/data") == [
        {
            "question": "What moves?\nA. A square\nB. A circle\nAnswer with the letter.",
            "answer": "A.",
            "videos": video,
        },
        {"question": "Where does it go?", "answer": "It goes to the right.", "videos": video},
    ]
    rows = list(import_rows("llava-video", tmp_path / "in.jsonl"))
    assert [row["id"] for row in rows] == ["101-1", "101-2"]
    assert {row["source"] for row in rows} == {"llava-video/0_30_s_academic_v0_1"}
    (row,) = import_rows("llava-hound-qa", write_jsonl([HOUND_QA], tmp_path / "in.jsonl"))
    assert row == {
        "id": "v_1_0",
        "source": "llava-hound-qa",
        "question": "What moves?",
        "answer": "A red square moves.",
        "videos": ["webvid/123"],
    }


def test_videochat2_it(tmp_path):
    (row,) = questions(tmp_path, "videochat2-it", VIDEOCHAT2_IT)
    assert row == {
        "question": "Choose.\nWhat moves?\nOptions:\n(A) a square\n(B) a circle",
        "answer": "Answer: (A) a square",
        "videos": ["tgif/1.gif"],
    }
    caption = {"image": "1.png", "QA": [{"i": "Describe the image.", "q": "", "a": "A square."}]}
    (row,) = questions(tmp_path, "videochat2-it", caption)
    assert (row["question"], row["images"]) == ("Describe the image.", ["1.png"])
    (row,) = questions(tmp_path, "videochat2-it", VIDEOCHAT2_IT | {"start": 2.0, "end": 5.5})
    assert row["videos"] == [{"path": "tgif/1.gif", "video_start": 2.0, "video_end": 5.5}]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, "a circle"),
        ({"answer": 0.0}, "a square"),  # parquet of pandas
        ({"answer": "a square"}, "a square"),
        ({"answer": None, "answer_index": 1}, "a circle"),
        ({"a0": None, "a1": None, "answer": 3}, "3"),
        ({"a0": None, "a1": None, "answer": 2.0}, "2"),
        ({"a0": None, "a1": None, "answer": 0.25}, "0.25"),
        ({"a0": None, "a1": None, "answer": True}, "yes"),
        ({"a0": 3, "a1": 4, "answer": "4"}, "4"),
        ({"a0": 0, "a1": 1, "answer": 1}, "1"),  # index and option say the same
        ({"a0": None, "a1": None, "options": ["x", "y"], "answer": 1}, "y"),
        ({"a0": None, "a1": None, "candidates": ["x", "y"], "answer": None, "answer_index": 0}, "x"),
        ({"answer": "B"}, "B"),
        ({"answer": "(B)", "answer_index": 1}, "a circle"),
        ({"answer": "A circle.", "answer_index": 1}, "a circle"),
        ({"answer": "1", "answer_index": 1}, "a circle"),
        ({"answer": "", "answer_index": 1}, "a circle"),
        ({"a0": 3, "a1": 4, "answer": 4, "answer_index": 1}, "4"),
        ({"a0": "B", "a1": "A", "a2": "D", "answer": 1}, "B"),  # generation would read the text as A
        ({"a0": "B", "a1": "A", "answer": None, "answer_index": 0}, "A"),
        ({"a0": "B", "a1": "A", "answer": "A", "answer_index": 1}, "B"),
        ({"a0": "B", "a1": "A", "a2": "D", "answer": "D"}, "D"),
        ({"a0": "A", "a1": "B", "answer": 1}, "B"),
        ({"a0": "x < y", "a1": "x > y", "answer": 1}, "x > y"),
    ],
)
def test_numbers_and_indices_as_answers(tmp_path, change, answer):
    record = {key: value for key, value in (NEXT_QA | change).items() if value is not None}
    (row,) = questions(tmp_path, "questions", record)
    assert row["answer"] == answer
    assert "options" not in row or answer in [*row["options"], "B"]


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        ("questions", {"answer": 2}, r"the answer's index is 2, but the options have the indices 0 to 1"),
        ("questions", {"a1": None, "a2": "z"}, "`a1` is missing, and `a2` is there"),
        ("questions", {"a0": "B. x", "a1": "A. y", "answer": "B"}, "have other letters than A, B and so on"),
        ("questions", {"answer": -1}, "the answer's index is -1"),
        ("questions", {"answer": 0.5}, r"the answer's index is 0\.5"),
        ("questions", {"a0": 1, "a1": 2}, "is 1, which is an option and the index of another"),
        ("questions", {"a0": None, "a1": None, "answer_index": 1}, "but the options have no entries"),
        ("questions", {"a0": ["x"]}, "the options are .* Give a list of texts"),
        ("questions", {"answer": None}, "`answer` is missing"),
        ("questions", {"options": ["x", "y"]}, "different lists of options"),
        ("questions", {"options": ["x", "y"], "choices": ["y", "x"], "a0": None, "a1": None}, "different lists of"),
        ("questions", {"answer": "1"}, "the answer '1' is none of the options .*its index as a number"),
        ("questions", {"a0": "B", "a1": "A", "answer": "A"}, "is 'A', which is an option and the letter of another"),
        ("questions", {"answer": "zz"}, "the answer 'zz' is none of the options"),
        ("questions", {"answer": True}, "the answer 'yes' is none of the options"),
        ("questions", {"a1": "A square"}, "the options A and B say the same"),
        ("questions", {"a1": None, "answer": 0}, "give a list of 2 to 26 texts"),
        ("questions", {"answer": "a square", "answer_index": 1}, "`answer_index` is 1, 'a circle', but `answer` is"),
        ("questions", {"answer": 0, "answer_index": 1}, "`answer_index` is 1, 'a circle', but `answer` is 0"),
        ("questions", {"a0": 1, "a1": 2, "answer": "1", "answer_index": 1}, "`answer_index` is 1, '2', but"),
        ("questions", {"start": -3, "end": math.nan}, "`start` -3 and `end` nan must be seconds"),
        ("questions", {"start": 0, "end": math.nan}, "`start` 0 and `end` nan must be seconds"),
        ("questions", {"answer": math.inf}, "an answer or option is inf"),
        ("questions", {"a1": math.nan}, "an answer or option is nan"),
        ("questions", {"a0": None, "a1": None, "answer": -math.inf}, "an answer or option is -inf"),
        (
            "llava-video",
            {"conversations": [{"from": "human", "value": "Which? A. red B. red"}, {"from": "gpt", "value": "A"}]},
            "the options A and B say the same",
        ),
        ("questions", {"video": None}, "neither a video nor an image to ask about"),
        ("llava-video", {"conversations": LLAVA_VIDEO["conversations"][:3]}, "a question .human. and its answer"),
        ("llava-video", {"conversations": LLAVA_VIDEO["conversations"][1:3]}, "a question .human. and its answer"),
        ("llava-hound-qa", {"conversations": [{"from": "human", "value": "<video>"}] * 2}, "a question .human. and"),
        ("llava-hound-qa", {"video": ""}, "neither a video nor an image"),
        ("videochat2-it", {"QA": "x"}, "`QA` is missing or not a list of questions"),
        ("videochat2-it", {"QA": [{"q": "Why?", "a": ""}]}, "`a` is empty"),
        ("videochat2-it", {"QA": [{"q": "", "a": "Yes."}]}, "`q` is empty"),
        ("videochat2-it", {"QA": [{"q": "<video>", "a": "Yes."}]}, "the question has no text"),
    ],
)
def test_bad_questions(tmp_path, fmt, change, message):
    path = write_jsonl([QUESTIONS[fmt] | change], tmp_path / "in.jsonl")
    with pytest.raises(ImportFormatError, match=f"line 1: .*{message}"):
        list(import_rows(fmt, path))


def test_ids_of_questions_are_unique(tmp_path):
    """A run tells its inputs apart by their ids; LLaVA-Video has several records for a video."""
    single = LLAVA_VIDEO | {"conversations": LLAVA_VIDEO["conversations"][:2]}
    path = write_jsonl([single, LLAVA_VIDEO, single, LLAVA_VIDEO, single], tmp_path / "in.json")
    counts = convert("llava-video", path, tmp_path / "out.jsonl")
    assert (counts.read, counts.written) == (5, 7)
    ids = ["101", "101-1", "101-2", "101.2", "101-1.2", "101-2.2", "101.3"]
    assert read_inputs(str(tmp_path / "out.jsonl")).ids == ids
    (note,) = [note for note in counts.left_to_do if "questions" in note]
    assert note.startswith("These are questions: `trl-vpo generate METHOD --dataset_name ")


def test_rows_with_and_without_options(tmp_path):
    plain = {"video": "1.mp4", "question": "How many squares?", "answer": 2}
    convert("questions", write_jsonl([plain, NEXT_QA], tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    plain, choice = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert set(plain) == {"id", "source", "question", "answer", "videos"}
    assert choice["options"] == ["a square", "a circle"]
    assert [row.example.get("options") for row in read_inputs(str(tmp_path / "out.jsonl"))] == [
        None,
        choice["options"],
    ]


def test_the_list_shows_every_format_and_field():
    shown = format_list()
    assert max(map(len, shown.splitlines())) <= 80
    blocks = dict(block.split(":", 1) for block in re.split(r"\n  (?=\S)", shown)[1:])
    for name, fmt in FORMATS.items():
        assert name in blocks and fmt.published in blocks[name]
        assert fmt.fields <= set(blocks[name].replace("|", " ").replace(";", " ").split())
    pairs, asked, held_out = re.split("Questions for|Benchmarks for", shown)
    for name in FORMATS:
        assert f"  {name}: " in (asked if name in QUESTIONS else pairs if name in RECORDS else held_out)
