"""Records of benchmarks that would be asked wrongly, blind or not at all: each is an error that names its place."""

import json

import pytest
from import_records import import_rows

from trl_vpo.data.importers import convert
from trl_vpo.data.inputs import read_inputs
from trl_vpo.errors import ImportFormatError
from trl_vpo.evaluate.rows import read_rows

POPE = {"image": "1.jpg", "text": "Is there a car?", "label": "yes"}
AMBER = {"id": 1, "image": "1.jpg", "query": "Is it?"}
TRUTH = {"id": 1, "type": "relation", "truth": "yes"}
HALLUSION = {"category": "VD", "subcategory": "chart", "set_id": "3", "figure_id": "1", "question_id": "0",
             "visual_input": "1", "question": "Is it?", "gt_answer": "1", "filename": "1.png"}  # fmt: skip
MME = {"videoID": "abc", "question_id": "1", "question": "What?", "options": ["A. cup", "B. cat"], "answer": "B"}
TVBENCH = {"video": "a.mp4", "question": "What?", "candidates": ["sit", "stand"], "answer": "stand"}
MCQ = {"Question": "What?", "Choices": {"A": "a", "B": "b"}, "Correct Answer": "B, A"}
TSH = {"video": "v", "Question": "Action A: a. Action B: b.", "Correct Answer": "BA"}
HALBENCH = {"image_id": 5, "question": "Describe it.", "image": "1.jpg"}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" and isinstance(records, list)
    path.write_text("".join(json.dumps(one) + "\n" for one in records) if lines else json.dumps(records))
    return path


def coco(folder):
    """The files that Object HalBench and AMBER look for."""
    write(folder / "annotations.json", [TRUTH])
    (folder / "synonyms_refine.txt").write_text("dog, puppy\n")
    for part in ("train", "val"):
        outlined = {"categories": [{"id": 18, "name": "dog"}], "annotations": []}
        write(folder / f"annotations/instances_{part}2014.json", outlined)
        said = {"annotations": [{"image_id": 5, "caption": "A puppy."}]}
        write(folder / f"annotations/captions_{part}2014.json", said)


@pytest.mark.parametrize(
    "fmt, record, message",
    [
        ("pope", POPE | {"image": None}, "line 1: `image` has 0 images; a record has one"),
        ("pope", POPE | {"image": ["1.jpg", "2.jpg"]}, "`image` has 2 images"),
        ("amber", AMBER | {"image": ""}, "`image` has 0 images"),
        ("hallusionbench", HALLUSION | {"filename": None}, "`filename` has 0 images"),
        ("hallusionbench", HALLUSION | {"gt_answer": 1.0}, r"the answer '1\.0' says neither yes nor no"),
        ("object-halbench", HALBENCH | {"image": None}, r"`image` \(or `image_path`\) has 0 images"),
        ("object-halbench", HALBENCH | {"image_id": 5.9}, r"`image_id` is 5\.9, not a whole number"),
        ("object-halbench", HALBENCH | {"image_id": "x"}, "`image_id` is 'x', not a whole number"),
        ("video-mme", MME | {"options": ["A. cup", "C. dog"]}, "line 1: the options .* do not begin with A., B."),
        ("video-mme", MME | {"options": ["B. cat", "A. cup"]}, "do not begin with A., B."),
        ("video-mme", MME | {"options": ["A. cup", "cat"]}, "do not begin with A., B."),
        ("video-mme", MME | {"answer": "AB"}, r"the answer 'AB' is none of the options \['A', 'B'\]"),
        ("video-mme", MME | {"answer": "cat"}, "the answer 'cat' is none of"),
        ("video-mme", MME | {"options": ["A. the cat", "B. a cat"]}, "line 1: the options A and B say the same"),
        ("video-mme", MME | {"options": ["A. cat"], "answer": "A"}, "line 1: .* give a list of 2 to 26 texts"),
        ("tvbench", TVBENCH | {"candidates": ["stand", "stand"]}, "line 1: the options A and B say the same"),
        ("tvbench", TVBENCH | {"answer": "B"}, "the answer 'B' is none of"),
        (
            "eventhallusion",
            {"id": "entire_1", "question": []},
            "the record asks nothing. It needs the fields id q",
        ),
        ("eventhallusion", {"id": "entire_1", "questions": []}, "the record asks nothing"),
    ],
)
def test_bad_records_of_benchmarks(tmp_path, fmt, record, message):
    coco(tmp_path)
    with pytest.raises(ImportFormatError, match=message):
        list(import_rows(fmt, write(tmp_path / "in.jsonl", [record])))


@pytest.mark.parametrize(
    "entry, message",
    [
        ([], "entry 8: the record asks nothing"),
        ({}, "entry 8: the record asks nothing"),
        ([{"q": "Is it?", "a": {}}], "a question has no clips with answers"),
        *(
            ({"y": MCQ | {"Correct Answer": said}}, f"the answer '{said}' is not letters of the choices, A, B. Write")
            for said in ("AE", "The Answer is B", "A. Dancing", "All of the above", "BOTH", "D", "b", "")
        ),
        (TSH | {"Correct Answer": "CD"}, "the answer 'CD' is not letters of the choices, A, B"),
        (TSH | {"video": None}, "entry 8: `video` is missing. The record has the fields video, Question, Correct"),
        ({"Question": "Which?", "Correct Answer": "BA"}, "entry 8: `video` is missing. The record has the fields Q"),
        ({"y": {"Question": "Which?"}}, r"entry 8: the record has another layout .`Choices` is missing"),
        ({"y": "Which?"}, "entry 8: .* another layout .a value is not of the kind that is read"),
        ("Scene change", "entry 8: .* another layout .a value is not of the kind that is read: 'Scene change'"),
        (TSH | {"Correct Answer": "AA"}, "`answer` is 'AA': give all right letters, each once, .* of A, B"),
    ],
)
def test_bad_entries_of_vidhalluc(tmp_path, entry, message):
    with pytest.raises(ImportFormatError, match=message):
        list(import_rows("vidhalluc", write(tmp_path / "in.json", {"8": entry})))


@pytest.mark.parametrize("said", ["B, A", "BA", "B and A", "B.A"])
def test_several_letters_of_vidhalluc(tmp_path, said):
    (row,) = import_rows("vidhalluc", write(tmp_path / "in.json", {"8": {"y": MCQ | {"Correct Answer": said}}}))
    assert row["answer"] == "BA"


def test_letters_name_the_options_of_video_mme(tmp_path):
    options = ["A. B", "B. A", "C. C", "D. D"]
    (row,) = import_rows("video-mme", write(tmp_path / "in.jsonl", [MME | {"options": options, "question_id": ["x"]}]))
    assert (row["answer"], row["options"], row["id"]) == ("B", ["B", "A", "C", "D"], "['x']")


def test_an_order_is_asked_for_behind_a_list(tmp_path):
    """Rows whose text has a list of its own are used, with all of their options."""
    options = ["A. (a)(b)(c).", "B. (b)(a)(c).", "C. (c)(b)(a).", "D. (d)(a)."]
    listed = "What comes first?\n(a) He sits.\n(b) He runs.\n(c) He eats."
    path, out = write(tmp_path / "in.jsonl", [MME | {"question": listed, "options": options}]), tmp_path / "out.jsonl"
    convert("video-mme", path, out)
    (row,) = read_rows(read_inputs(str(out)))
    assert row.facts["options"] == [option[3:] for option in options] and row.facts["expected"] == "B"


@pytest.mark.parametrize("part", [{}, {"start": None, "end": None}])
def test_tvbench_needs_the_part_that_is_shown(tmp_path, part):
    path = write(tmp_path / "action_localization.json", [TVBENCH | part])
    with pytest.raises(ImportFormatError, match="`start` is missing; action_localization shows a part"):
        list(import_rows("tvbench", path))


def test_elv_halluc_misses_lines(tmp_path):
    kinds = {"ground_truth": "Yes", "in_video": "No", "out_video": "No"}
    records = [
        {"video": f"{n}.mp4", "question": "Is it?", "caption_type": kind, "ref_answer": answer}
        for n in range(3)
        for kind, answer in kinds.items()
    ]
    for lost, message in (
        (records[:5], "line 4: the file ends before the three captions of its event do"),
        (records[:1] + records[4:], r"line 1: it is about 0\.mp4, and one beside it about 1\.mp4: lines were lost"),
        ([records[0] | {"video": None}, *records[1:]], "line 1: `video` has 0 videos"),
    ):
        with pytest.raises(ImportFormatError, match=message):
            list(import_rows("elv-halluc", write(tmp_path / "in.jsonl", lost)))


def test_lines_of_subtitles(tmp_path):
    folder = tmp_path / "subtitle"
    folder.mkdir()
    spoken = "<i>It was</i>\n2000\n\n2\n00:02 --> 00:03\n<near> the {sea} -->"
    (folder / "abc.SRT").write_text(f"\ufeff1\n00:01,000 --> 00:02,000\n{spoken}\n", encoding="utf-8")
    (folder / "empty.srt").write_text("\n")
    path = write(tmp_path / "in.jsonl", [MME, MME | {"videoID": "empty"}, MME | {"videoID": "none"}])
    first, empty, none = (row["question"].split("\n\n")[0] for row in import_rows("video-mme-subtitles", path))
    assert first == "The subtitles of the video:\nIt was\n2000\n<near> the {sea} -->"
    assert empty == none == "The video has no subtitles."
    notes = convert("video-mme-subtitles", path, tmp_path / "out.jsonl").left_to_do
    assert "2 of 3 prompts say that the video has no subtitles: no .srt file has its name." in notes


def test_files_beside_benchmarks_are_named(tmp_path):
    coco(tmp_path)
    path = write(tmp_path / "in.jsonl", [AMBER])
    write(tmp_path / "annotations.json", [TRUTH, TRUTH | {"truth": "no"}])
    with pytest.raises(ImportFormatError, match=r"annotations\.json: 2 entries have the id 1\. Leave one"):
        list(import_rows("amber", path))
    (tmp_path / "synonyms_refine.txt").write_text("cat\n")
    with pytest.raises(ImportFormatError, match=r"synonyms_refine\.txt: object 'dog' is not in the table"):
        list(import_rows("object-halbench", path))


def test_dots_in_the_name_of_a_file(tmp_path):
    (row,) = import_rows("pope", write(tmp_path / "coco.v2_pope_random.json", [POPE]))
    assert (row["id"], row["group"]) == ("coco.v2_pope_random-0", "random")
