"""Benchmarks as held-out rows: records in the published forms, written here, and what `trl-vpo evaluate` reads."""

import base64
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from import_records import import_rows
from PIL import Image

from trl_vpo.data.import_formats import FORMATS
from trl_vpo.data.importers import convert
from trl_vpo.data.inputs import read_inputs
from trl_vpo.errors import ImportFormatError
from trl_vpo.evaluate.rows import read_rows
from trl_vpo.text.chair import ObjectTable


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" or "pope" in path.name  # POPE's files have lines and end in .json
    text = "".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content, indent=4)
    path.write_text(text, encoding="utf-8")
    return path


def imported(fmt, path, **options):
    rows = list(import_rows(fmt, path, **options))
    assert {row.pop("source") for row in rows} == {fmt}
    return rows


def yes_no(row_id, question, answer, **columns):
    return {"id": row_id, "task": "yes_no", "question": question, "answer": answer, **columns}


def test_pope_takes_a_folder(tmp_path):
    for kind, label in (("random", "yes"), ("adversarial", "no")):
        record = {"question_id": 1, "image": "1.jpg", "text": "Is there a car in the image?", "label": label}
        write(tmp_path / f"coco_pope_{kind}.json", [record])
    question = "Is there a car in the image?"
    assert imported("pope", tmp_path, media_root="/coco") == [
        yes_no("coco_pope_adversarial-0", question, "no", images=["/coco/1.jpg"], group="adversarial"),
        yes_no("coco_pope_random-0", question, "yes", images=["/coco/1.jpg"], group="random"),
    ]
    with pytest.raises(ImportFormatError, match=r"no \*_pope_\*\.json lies in this folder"):
        list(import_rows("pope", write(tmp_path / "empty" / "a.txt", []).parent))


def test_a_folder_may_hold_compressed_files(tmp_path):
    asked = json.dumps({"image": "1.jpg", "text": "Is there a car?", "label": "yes"}).encode()
    (tmp_path / "coco_pope_random.json.gz").write_bytes(gzip.compress(asked))
    (tmp_path / "coco_pope_popular.JSON").write_bytes(asked)
    (tmp_path / "._coco_pope_popular.json").write_bytes(b"\0\5\x16\7")  # what macOS writes beside it
    assert [row["group"] for row in imported("pope", tmp_path)] == ["popular", "random"]
    (tmp_path / "coco_pope_random.json").write_bytes(asked)
    with pytest.raises(ImportFormatError, match="lies in this folder compressed and not, or twice"):
        list(import_rows("pope", tmp_path))
    (tmp_path / "sth.json.gz").write_bytes(gzip.compress(b'{"z": {"Scene change": "Yes"}}'))
    assert imported("vidhalluc", tmp_path / "sth.json.gz")[0]["answer"] == "yes"


AMBER_TYPES = {
    1005: ("discriminative-attribute-state", "yes", "attribute"),
    8633: ("discriminative-hallucination", "no", "existence"),
    13557: ("discriminative-relation", "yes", "relation"),
    13558: ("relation", "no", "relation"),
}


def test_amber_takes_its_answers_from_the_annotations(tmp_path):
    records = [{"id": i, "image": "AMBER_1.jpg", "query": "Is the sky sunny?"} for i in AMBER_TYPES]
    path = write(tmp_path / "data/query/query_discriminative.json", records)
    with pytest.raises(ImportFormatError, match=r"annotations\.json lies neither beside it nor in the folder above"):
        list(import_rows("amber", path))
    truth = [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]}]
    truth += [{"id": i, "type": kind, "truth": answer} for i, (kind, answer, _) in AMBER_TYPES.items()]
    write(tmp_path / "data/annotations.json", truth)
    assert imported("amber", path) == [
        yes_no(str(i), "Is the sky sunny?", answer, images=["AMBER_1.jpg"], group=group)
        for i, (_, answer, group) in AMBER_TYPES.items()
    ]
    assert imported("amber", path.parent) == imported("amber", path)  # its folder has other queries, too
    write(tmp_path / "data/annotations.json", [one | {"id": str(one["id"])} for one in truth])
    assert [row["answer"] for row in imported("amber", path)] == [answer for _, answer, _ in AMBER_TYPES.values()]
    write(path, [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}])
    with pytest.raises(ImportFormatError, match="item 1: `id` 1 is not a discriminative question"):
        list(import_rows("amber", path))


def test_hallusionbench_has_figures_and_questions(tmp_path):
    def record(kind, figure, question, seen, answer):
        name = f"./hallusion_bench/{kind}/chart/3_{figure}.png" if seen != "0" else None
        places = {"set_id": "3", "figure_id": figure, "question_id": question, "visual_input": seen}
        return {"category": kind, "subcategory": "chart", **places, "sample_note": "x", "question": "Is it?",
                "gt_answer_details": "It is.", "gt_answer": answer, "filename": name}  # fmt: skip

    records = [record("VD", "0", "0", "1", "1"), record("VD", "1", "0", "2", "0"), record("VS", "0", "1", "0", "1")]
    first, second, third = imported("hallusionbench", write(tmp_path / "HallusionBench.json", records))
    assert first == yes_no(
        "VD_chart_3_0_0", "Is it?", "yes", images=["./hallusion_bench/VD/chart/3_0.png"], group="VD",
        sets={"question": "VD_chart_3_q0", "figure": "VD_chart_3_0"},
    )  # fmt: skip
    assert second["sets"] == {"question": "VD_chart_3_q0", "figure": "VD_chart_3_1"} and second["answer"] == "no"
    assert "images" not in third and third["sets"] == {"question": "VS_chart_3_q1", "figure": None}
    del records[0]["set_id"]
    path = write(tmp_path / "HallusionBench.json", records)
    with pytest.raises(ImportFormatError, match="item 1: `set_id` is missing, which tells the set"):
        list(import_rows("hallusionbench", path))
    counts = convert("hallusionbench", path, tmp_path / "rows.jsonl", on_bad="skip")
    assert any("A set of questions that lost a record is right where the rest" in note for note in counts.left_to_do)


def test_tvbench_cuts_two_of_its_tasks(tmp_path):
    record = {"video": "a.mp4", "question": "What comes first?", "candidates": ["sit", "stand"], "answer": "stand"}
    for name in ("action_count", "action_sequence"):
        write(tmp_path / f"{name}.json", [record | {"start": 1.5, "end": 4}])
    whole, cut = imported("tvbench", tmp_path, media_root="/tv")
    assert whole == {
        "id": "action_count-0", "task": "choice", "answer": "B", "options": ["sit", "stand"], "group": "action_count",
        "question": "What comes first?\nA. sit\nB. stand\nAnswer with the letter of the right option.",
        "videos": ["/tv/action_count/a.mp4"],
    }  # fmt: skip
    assert cut["videos"] == [{"path": "/tv/action_sequence/a.mp4", "video_start": 1.5, "video_end": 4.0}]
    capitals = write(tmp_path / "capitals/action_sequence.JSON", [record | {"start": 1.5, "end": 4}])
    assert imported("tvbench", capitals, media_root="/tv")[0]["videos"] == cut["videos"]
    for change, message in (
        ({"answer": "run"}, "the answer 'run' is none of the options"),
        ({"end": None}, "`start` 1.5 and `end` None must be seconds"),
        ({"candidates": "sit"}, "the options are 'sit'"),
    ):
        path = write(tmp_path / "bad/action_sequence.json", [record | {"start": 1.5, "end": 4} | change])
        with pytest.raises(ImportFormatError, match=f"item 1: {message}"):
            list(import_rows("tvbench", path))


def test_eventhallusion_asks_several_questions(tmp_path):
    asked = [{"type": "hallucination", "question": q, "answer": "No."} for q in ("Does he eat?", "Does he run?")]
    path = write(tmp_path / "entire_questions.json", [{"id": "entire_001", "event_info": {}, "questions": asked}])
    about = {"videos": ["entire/entire_001.mp4"], "group": "entire"}
    assert imported("eventhallusion", path) == [
        yes_no(f"entire_001-{n}", f"{one['question']}\nPlease answer yes or no:", "no", **about)
        for n, one in enumerate(asked, 1)
    ]


def test_vidhalluc_has_four_tasks(tmp_path):
    files = {
        "bqa": {"7": [{"q": "Does she jump?", "a": {"x_1_2": "Yes", "x_3_4": "No"}}]},
        "mcq": {"8": {"y_1_2": {"Question": "What?", "Choices": {"A": "a", "B": "b"}, "Correct Answer": "B, A"}}},
        "sth": {"z": {"Scene change": "Yes", "Locations": "from a to b."}},
        "tsh": {"9": {"video": "v_0", "Question": "Action A: a. Action B: b.", "Correct Answer": "BA"}},
    }
    for name, content in files.items():
        write(tmp_path / f"{name}.json", content)
    first, second, several, scene, order = imported("vidhalluc", tmp_path)
    assert first == yes_no(
        "bqa-7-1", "Does she jump? Only answer with a single word 'Yes' or 'No'.", "yes", videos=["x_1_2.mp4"],
        group="bqa", cluster="7", sets={"question": "7-0"},
    )  # fmt: skip
    assert (second["answer"], second["videos"], second["sets"]) == ("no", ["x_3_4.mp4"], first["sets"])
    assert several["question"].startswith("What? Please select") and several["question"].endswith("\nA. a\nB. b")
    assert (several["task"], several["answer"], several["videos"]) == ("letters", "BA", ["y_1_2.mp4"])
    assert (scene["task"], scene["answer"], scene["videos"]) == ("yes_no", "yes", ["z.mp4"])
    assert (order["answer"], order["ordered"], order["videos"]) == ("BA", True, ["v_0.mp4"])
    facts = [row.facts for row in read_rows(inputs_of("vidhalluc", tmp_path))]
    assert [(one["expected"], one["group"]) for one in facts] == [
        ("yes", "bqa"), ("no", "bqa"), ("AB", "mcq"), ("yes", "sth"), ("BA", "tsh")
    ]  # fmt: skip
    files["mcq"]["8"]["y_1_2"]["Correct Answer"] = "none"
    write(tmp_path / "bad.json", files["mcq"])
    with pytest.raises(ImportFormatError, match="entry 8: the answer 'none' is not letters of the choices, A, B"):
        list(import_rows("vidhalluc", tmp_path / "bad.json"))
    write(tmp_path / "bad.json", {"9": {"Question": "What?"}})
    with pytest.raises(ImportFormatError, match="entry 9: `video` is missing"):
        list(import_rows("vidhalluc", tmp_path / "bad.json"))


def inputs_of(fmt, path):
    """The rows of a benchmark as `trl-vpo evaluate` reads them from the file that `trl-vpo import` writes."""
    folder = path if path.is_dir() else path.parent
    convert(fmt, path, folder / "out.jsonl")
    return read_inputs(str(folder / "out.jsonl"))


def test_elv_halluc_stands_in_triplets(tmp_path):
    kinds = {"ground_truth": "Yes", "in_video": "No", "out_video": "No"}
    records = [
        {"video": f"{n}.mp4", "question": f"Is it correct? {kind}", "caption_type": kind, "ref_answer": answer,
         "aspect": "action", "part_nums": 3}
        for n in range(2)
        for kind, answer in kinds.items()
    ]  # fmt: skip
    rows = imported("elv-halluc", write(tmp_path / "ELV_Halluc.jsonl", records))
    assert rows[0]["sets"] == {"in_video": "0", "out_video": "0"}
    assert [row["sets"] for row in rows[4:]] == [
        {"in_video": "1", "out_video": None}, {"in_video": None, "out_video": "1"}
    ]  # fmt: skip
    assert [(row["answer"], row["group"]) for row in rows[:3]] == [
        ("yes", "action"),
        ("no", "action"),
        ("no", "action"),
    ]
    write(tmp_path / "bad.jsonl", [records[0] | {"caption_type": "other"}])
    with pytest.raises(ImportFormatError, match="line 1: `caption_type` is 'other': it is one of ground_truth"):
        list(import_rows("elv-halluc", tmp_path / "bad.jsonl"))
    write(tmp_path / "bad.jsonl", records[:3] + records[4:])  # or captions of two events would make a set
    with pytest.raises(ImportFormatError, match="line 4: `caption_type` is in_video, and ground_truth is due"):
        list(import_rows("elv-halluc", tmp_path / "bad.jsonl"))


def test_video_mme_with_and_without_subtitles(tmp_path):
    record = {"video_id": "001", "duration": "short", "videoID": "abc", "question_id": "001-1", "question": "What?",
              "options": ["A. a cup.", "B. a cat."], "answer": "B", "url": "u"}  # fmt: skip
    path = tmp_path / "videomme" / "test.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([record, record | {"videoID": "d", "question_id": "002-1"}]), path)
    plain, _ = imported("video-mme", path)
    listed = "What?\nA. a cup.\nB. a cat.\nAnswer with the letter of the right option."
    assert plain == {"id": "001-1", "task": "choice", "question": listed, "answer": "B", "group": "short",
                     "options": ["a cup.", "a cat."], "videos": ["abc.mp4"]}  # fmt: skip
    shown = [
        ("00:00:01,000 --> 00:00:02,000", '<font color="#fff">Good day.</font>'),
        ("00:01,000 --> 00:02,000", "Bye."),
    ]
    text = "\n\n".join(f"{n}\n{time}\n{line}" for n, (time, line) in enumerate(shown, 1))
    (tmp_path / "subtitle" / "subtitle").mkdir(parents=True)  # unpacked into a folder of its own
    with pytest.raises(ImportFormatError, match=r"subtitle has no .srt files"):
        imported("video-mme-subtitles", path)
    (tmp_path / "subtitle" / "abc.srt").write_bytes(b"caf\xe9")
    with pytest.raises(ImportFormatError, match=r"row 0: .*subtitle/abc.srt is not UTF-8 .*Save it as UTF-8"):
        imported("video-mme-subtitles", path)
    (tmp_path / "subtitle" / "abc.srt").write_text(text)
    spoken, silent = (row["question"] for row in imported("video-mme-subtitles", path))
    assert spoken == f"The subtitles of the video:\nGood day.\nBye.\n\n{listed}"
    assert silent == f"The video has no subtitles.\n\n{listed}"


def test_mmhal_bench_is_rated(tmp_path):
    record = {"question_type": "attribute", "question_topic": "outdoor", "image_id": "df", "image_content": ["Cap"],
              "image_src": "https://a.b/c_o.jpg", "question": "What colour?", "gt_answer": "Yellow.",
              "model_answer": ""}  # fmt: skip
    path = write(tmp_path / "response_template.json", [record])
    assert imported("mmhal-bench", path, media_root="/mmhal") == [
        {"id": "0", "task": "rated", "question": "What colour?", "answer": "Yellow.", "images": ["/mmhal/c_o.jpg"],
         "contents": ["Cap"], "group": "attribute"}
    ]  # fmt: skip
    (row,) = read_rows(inputs_of("mmhal-bench", path))
    assert row.facts == {"question": "What colour?", "reference": "Yellow.", "contents": "Cap", "group": "attribute"}


def test_object_halbench_has_the_objects_of_coco(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (200, 200), "red").save(picture, "PNG")
    record = {"image_id": 5, "question": "Describe it.", "image": base64.b64encode(picture.getvalue()).decode()}
    path = write(tmp_path / "obj_halbench_300_with_image.jsonl", [record, record | {"question": "What is there?"}])
    (tmp_path / "synonyms_refine.txt").write_text("person, man\ndog, puppy\ndining table, table\n")
    for part in ("train", "val"):
        categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
        outlined = [{"image_id": 5, "category_id": 18}] if part == "val" else [{"image_id": 6, "category_id": 1}]
        said = [{"image_id": 5 if part == "val" else 6, "caption": "Puppies under a table."}]
        write(tmp_path / f"annotations/instances_{part}2014.json", {"categories": categories, "annotations": outlined})
        write(tmp_path / f"annotations/captions_{part}2014.json", {"annotations": said})
    first, second = imported("object-halbench", path, media_folder=tmp_path / "media")
    assert (first["id"], second["id"], first["task"]) == ("5-0", "5-1", "chair")
    assert first["objects"] == ["dining table", "dog"] and first["images"] == second["images"]
    table = ObjectTable({"person": [], "dog": [], "dining table": []})
    assert [row.facts["objects"] for row in read_rows(inputs_of("object-halbench", path), table)] == [
        ["dining table", "dog"]
    ] * 2
    write(path, [record | {"image_id": 7}])
    with pytest.raises(ImportFormatError, match="line 1: `image_id` 7 is not an image of COCO"):
        list(import_rows("object-halbench", path, media_folder=tmp_path / "media"))


@pytest.mark.parametrize(
    ("beside", "why"),
    [('[{"id": 1', r"annotations.json cannot be read as JSON; mend it, or fetch"), ('{"1": 2}', "has another layout")],
)
def test_damaged_files_beside_it_are_named(beside, why, tmp_path):
    (tmp_path / "annotations.json").write_text(beside)
    path = write(tmp_path / "query.json", [{"id": 1, "image": "1.jpg", "query": "Is it?"}])
    with pytest.raises(ImportFormatError, match=why):
        list(import_rows("amber", path))


def test_every_benchmark_is_tested_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in source for name, fmt in FORMATS.items() if fmt.makes == "held-out rows")


def test_the_import_says_what_to_do_with_them(tmp_path):
    record = {"question_id": 1, "image": "1.jpg", "text": "Is there a car?", "label": "yes"}
    counts = convert("pope", write(tmp_path / "coco_pope_random.json", [record]), tmp_path / "rows.jsonl")
    assert any("`trl-vpo evaluate --data" in note for note in counts.left_to_do)
    assert counts.ignored_fields == ["question_id"]
