"""The rows of a held-out set as people write them: answers in every form, mistakes by name, clusters."""

import shutil

import pytest
from helpers import write_clip

from trl_vpo.data.inputs import InputRow, near_misses, read_inputs
from trl_vpo.data.rows import drop_none
from trl_vpo.errors import EvaluateError
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.results import evidence
from trl_vpo.evaluate.rows import read_rows
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.text.chair import ObjectTable

QUESTION = {"task": "yes_no", "question": "Is it red?", "answer": "Yes.", "pair": "p"}
CHOICE = {"task": "choice", "question": "Which?", "options": ["red", "blue"], "answer": "B"}
LETTERS = {"task": "letters", "question": "Which?\nA. x\nB. y\nC. z", "answer": "AC"}
CAPTION = {"task": "chair", "question": "Describe.", "objects": ["square"]}


def inputs(*rows):
    return [InputRow(f"r{i}", drop_none(row)) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "rows, why",
    [
        (
            [{"task": "yesno"}],
            r"row 0 \(id 'r0'\): `task` is 'yesno': one of preference, yes_no, choice, letters",
        ),
        (
            [{"question": "Is it red?"}],
            r"row 0 \(id 'r0'\): has a question and no `task`: give one of .*has no `chosen`",
        ),
        ([{**QUESTION, "answer": "maybe"}], "`answer` is 'maybe': a yes/no question needs yes or no"),
        ([{**QUESTION, "answer": ["yes"]}], r"`answer` is \['yes'\]: a yes/no question needs yes or no"),
        ([{**QUESTION, "role": ["basic"]}], r"`role` is \['basic'\] and `answer` 'yes'"),
        ([{"task": ["yes_no"]}], r"`task` is \['yes_no'\]: one of"),
        ([{**QUESTION, "role": "hallucinated"}], "`role` is 'hallucinated' and `answer` 'yes'"),
        ([{**QUESTION, "pair": None, "sets": "3_1"}], "`sets` is '3_1': give the id of a set for each kind"),
        ([QUESTION, QUESTION], r"pair 'p' needs one .* it has row 0 \(id 'r0'\): yes, row 1 \(id 'r1'\): yes"),
        ([{**QUESTION, "question": "<video> Is it red?"}], "holds the marker <video>"),
        ([{**CHOICE, "answer": "C"}], r"`answer` is 'C': give the letter of the right option \(A, B\)"),
        ([{**CHOICE, "options": ["1", "2"], "answer": 1}], "`answer` is 1: give the letter of the right option"),
        ([{**CHOICE, "answer": ["A"]}], r"`answer` is \['A'\]: give the letter"),
        ([{**CHOICE, "options": None}], "there are no options"),
        ([{**CHOICE, "options": ["red", "Red."]}], "say the same"),
        ([{**CHOICE, "task": "letters", "answer": "B, A"}], "`answer` is 'B, A': give all right letters"),
        ([{**LETTERS, "answer": "AD"}], "`answer` is 'AD': give all right letters, each once, such as BD, of A, B, C"),
        ([{**LETTERS, "answer": "AA"}], "`answer` is 'AA': give all right letters"),
        ([{**LETTERS, "question": "Which?"}], "'AC': .* of none: the question lists no options"),
        ([{**LETTERS, "options": ["x", "y"]}], "`options` is .*, but the question lists"),
        ([{**CHOICE, "task": "letters", "ordered": "false"}], "`ordered` is 'false': give true where the order"),
        ([{**CHOICE, "task": "rated", "answer": " "}], "`answer` is ' ': give a person's answer"),
        ([{**CHOICE, "task": "rated", "answer": "A.", "contents": "a dog"}], "`contents` is 'a dog': list what"),
        ([{**CAPTION, "objects": None}], "`objects` is None"),
        ([{**CAPTION, "objects": ["unicorn"]}], "'unicorn' is not in the table"),
        ([{**CAPTION, "question": " "}], "`question` is ' '"),
    ],
)
def test_rows_that_break_the_contract(rows, why):
    with pytest.raises(EvaluateError, match=why):
        read_rows(inputs(*rows), ObjectTable({"square": []}))


def test_a_near_miss_of_a_column_is_named():
    assert near_misses(["question", "anwser", "option", "image_id", "source", "vidoes"]) == [
        ("anwser", "answer"),
        ("option", "options"),
        ("vidoes", "videos"),
    ]
    assert near_misses(["pair_id", "groupId", "image_id"]) == [("pair_id", "pair"), ("groupId", "group")]
    assert near_misses(["pair", "pair_id"]) == []
    assert near_misses(["question", "answer", "answers", "images", "imgs", "prompt_template"]) == []


# --- clusters -----------------------------------------------------------------------------------------------------


def test_clusters_are_media_unless_the_row_says_otherwise():
    part = {"path": "v/1.mp4", "video_start": 2.0}
    rows = read_rows(
        inputs(
            {**QUESTION, "videos": ["v/1.mp4"]},
            {**QUESTION, "answer": "no", "video": part},
            {**CHOICE, "cluster": 7, "images": ["i/1.png"]},
            {**CHOICE, "image": "./i/1.png"},
            {**CHOICE, "videos": [["f/1.png", "f/2.png"]], "images": ["i/1.png"]},
            CHOICE,
            {**CHOICE, "image": {"path": "1.png", "bytes": b"a picture"}},
            {**CHOICE, "images": [b"a picture"]},
            {**CHOICE, "images": [b"another picture"]},
        )
    )
    clusters = [row.cluster for row in rows]
    assert clusters[:6] == ["v/1.mp4", "v/1.mp4", "7", "i/1.png", "f/1.png", "r5"]
    assert clusters[6] == clusters[7] != clusters[8]
    assert rows[1].facts == {"question": "Is it red?", "expected": "no", "pair": "p"}
    assert rows[2].facts == {"question": "Which?", "expected": "B", "options": ["red", "blue"]}


def test_single_questions_have_groups_and_sets():
    sets = {"figure": 3, "question": "a", "unused": None}
    rows = read_rows(inputs(*({**QUESTION, "pair": None, "group": 7, "sets": sets}, {**CHOICE, "group": "b"})))
    assert rows[0].facts == {
        "question": "Is it red?", "expected": "yes", "group": "7", "sets": {"figure": "3", "question": "a"}
    }  # fmt: skip
    assert rows[1].facts["group"] == "b"


def test_letters_are_those_of_the_options():
    (row,) = read_rows(inputs({**LETTERS, "answer": "CA"}))
    assert row.facts == {"question": LETTERS["question"], "letters": "ABC", "ordered": False, "expected": "AC"}
    given = {**LETTERS, "question": "Which?", "options": ["u", "v", "w", "x", "y"], "answer": "EA", "ordered": True}
    (row,) = read_rows(inputs(given))
    assert row.facts["question"] == "Which?\nA. u\nB. v\nC. w\nD. x\nE. y"
    assert (row.facts["letters"], row.facts["expected"]) == ("ABCDE", "EA")


def test_an_empty_name_is_none():
    empty = {"cluster": "", "group": "", "pair": "", "sets": {"figure": ""}}
    rows = read_rows(inputs({**QUESTION, **empty}, {**CHOICE, "cluster": "", "group": ""}))
    assert [row.cluster for row in rows] == ["r0", "r1"]
    assert rows[0].facts == {"question": "Is it red?", "expected": "yes", "sets": {}}
    assert "group" not in rows[1].facts


def test_clusters_stay_where_media_move(tmp_path):
    """A run may continue where the media lie elsewhere: the rows before and after are of the same clusters."""
    clip = write_clip(tmp_path / "clip.mp4")
    data = write_jsonl([{**CHOICE, "id": "a", "videos": ["clip.mp4"]}], tmp_path / "rows.jsonl")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shutil.copy(clip, tmp_path / place / "clip.mp4")
        config = EvaluateConfig(dataset_name=str(data), media_root=str(tmp_path / place))
        rows = read_inputs(**config.input_options())
        assert rows[0].videos == (str(tmp_path / place / "clip.mp4"),)
        assert [row.cluster for row in read_rows(rows)] == ["clip.mp4"]


def test_pairs_that_share_a_cluster_are_one_cluster():
    """Questions about v1 to v5: what pairs have in common may come through a third pair."""
    pairs = [("v1", "v1"), ("v2", "v3"), ("v4", "v4"), ("v3", "v5"), ("v5", "v4"), ("v1", "v1")]
    records = [
        {"task": "yes_no", "pair": str(i), "expected": side, "said": side, "cluster": cluster}
        | {"response": side, "response_tokens": 1, "response_ended": True}
        for i, both in enumerate(pairs)
        for side, cluster in zip(("yes", "no"), both)
    ]
    _, clusters = evidence(records, records)["yes_no"]
    assert [clusters.index(cluster) for cluster in clusters] == [0, 1, 1, 1, 1, 0]
