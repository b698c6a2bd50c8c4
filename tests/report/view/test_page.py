"""The page of preference data as a file: it holds everything, and nothing in it can run."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from helpers import message, row, write_clip, write_image
from PIL import Image

from trl_vpo.data.rows import read_row, response_text
from trl_vpo.errors import UserError
from trl_vpo.media.load import VideoOptions, load_video
from trl_vpo.media.masking import masked_image_list
from trl_vpo.report.view import page as page_module
from trl_vpo.report.view import row as row_module
from trl_vpo.report.view.page import write_page
from trl_vpo.testbed.rows import write_jsonl, write_preferences

BLOCK = re.compile(r'<script type="application/json" class="(\w+)"(?: data-number="(\d+)")?>(.*?)</script>', re.S)


class Page:
    """The contents of a page, read as its script reads them."""

    def __init__(self, path):
        self.html = path.read_text(encoding="utf-8")
        blocks = {"rows": [], "rejected": [], "summary": [], "pictures": {}, "counts": {}}
        for kind, _, text in BLOCK.findall(self.html):
            block = json.loads(text, parse_constant=pytest.fail)
            blocks[kind] = blocks[kind] + block if isinstance(block, list) else blocks[kind] | block
        vars(self).update(blocks)

    def images(self, n):
        """The decoded pictures of row n, one list for each group."""
        urls = iter(self.pictures[str(n)])
        return [[decoded(next(urls)) for _ in group["pictures"]] for group in self.rows[n]["media"]]


def decoded(url):
    head, data = url.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def page_of(tmp_path, rows, **options):
    write_page(write_jsonl(rows, tmp_path / "rows.jsonl"), tmp_path / "page.html", **options)
    return Page(tmp_path / "page.html")


def alike(image, pixels):
    return np.abs(np.asarray(image, dtype=int) - np.asarray(pixels, dtype=int)).mean() < 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return [row for kind in ("clip", "scene") for row in write_preferences(kind, 10, 5, folder / kind)[1]]


def test_a_run_is_shown_whole(tmp_path, world):
    rows = [{**row, "chosen_reward": -0.5 * n, "flag": n > 3} for n, row in enumerate(world)]
    rows[1]["videos"] = [str(tmp_path / "gone.mp4")]
    rows[2]["generated_by"] = {"pipeline": "leanpo", "adapter": None}
    write_jsonl(rows, tmp_path / "rows.jsonl")
    left_out = {"kind": "answered correctly", "reason": "It was right."}
    write_jsonl([{"id": f"in-{n}", **left_out, "notes": {"n": n}} for n in range(3)], tmp_path / "rejected.jsonl")
    summary = {"rows": 20, "left out": {"answered correctly": 3}, "ids": [1, 2]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "new" / "page.html"
    counts = write_page(tmp_path, out)
    page = Page(out)
    assert counts.pictures == 9 * 8 + 10 * (2 + 5) == sum(map(len, page.pictures.values()))
    shown = "20 rows; 1 with problems; 40 media, 1 of which cannot be shown; 142 pictures; 3 left out by the run; "
    assert str(counts).startswith(shown) and not counts.limited
    assert counts.file_bytes == out.stat().st_size and page.counts == {**vars(counts), "file_bytes": 0}
    assert [(row["n"], row["id"]) for row in page.rows] == [(n, row["id"]) for n, row in enumerate(rows)]
    assert page.rows[4]["columns"] == [["chosen_reward", -2.0], ["flag", True]]
    assert page.rows[2]["more"] == [["generated_by", '{\n "pipeline": "leanpo",\n "adapter": null\n}']]
    assert page.rows[0]["prompt"] == [["user", [["video", 1], "Describe the video."]]]
    (group,) = page.rows[1]["media"]
    assert "gone.mp4 does not exist" in group["error"] and "pictures" not in group and "1" not in page.pictures
    assert page.rejected[2] == {"id": "in-2", **left_out, "more": '{\n "notes": {\n  "n": 2\n }\n}'}
    assert page.summary == [["rows", 20], ["left out / answered correctly", 3], ["ids", "[1, 2]"]]
    # The file of rows alone shows the files of the run beside it, too.
    assert write_page(tmp_path / "rows.jsonl", tmp_path / "page.html").rejected == 3


def test_phrases_are_those_of_training(tmp_path):
    rows = [
        row(None, chosen="A red 🙂 car, parked.", rejected="A blue 🙂 van, parked."),
        row(None, chosen="A <MASK> red </MASK> car.", rejected="A <MASK> blue </MASK> car."),
        row(None, chosen="one two three", rejected="one 2 3", chosen_phrases=[[4, 7]], rejected_phrases=[]),
        {"prompt": "Which colour?", "chosen": "It is red.", "rejected": "It is red, and blue."},
    ]
    page = page_of(tmp_path, rows)
    for example, record in zip(rows, page.rows):
        expected = read_row(example, phrases=True)
        for side in ("chosen", "rejected"):
            pieces = record[side]
            assert "".join(pieces) == response_text(getattr(expected, side))
            ends = np.cumsum([len(piece) for piece in pieces]).tolist()
            spans = [(ends[at - 1], ends[at]) for at in range(1, len(pieces), 2)]
            assert spans == getattr(expected, f"{side}_phrases")
    assert page.rows[0]["chosen"] == ["A ", "red", " 🙂 ", "car", ", parked."]
    assert page.rows[1]["rejected"] == ["A ", "blue", " car."]
    assert page.rows[3]["prompt"] == [["prompt", ["Which colour?"]]]
    assert not any(record["problems"] or record["notes"] for record in page.rows)


def test_frames_are_the_clips_with_their_times(tmp_path, world, monkeypatch):
    monkeypatch.setattr(row_module, "THUMB_PIXELS", 1000)
    wild = {"path": write_clip(tmp_path / "clip.mp4", 40), "num_frames": 30, "max_pixels": 10**6, "video_start": 1.0}
    page = page_of(tmp_path, [world[0], row("video", [wild])], num_frames=3)
    clip = load_video(world[0]["videos"][0], VideoOptions(num_frames=3, max_pixels=1000))
    (group,), (images,) = page.rows[0]["media"], page.images(0)
    assert group["pictures"] == [[38, 25, "0.00 s"], [38, 25, "1.00 s"], [38, 25, "1.75 s"]]
    assert group["title"] == "Video 1" and group["what"].endswith("0000.mp4 · 2.00 s · 8 frames · 4 a second")
    assert [alike(image, frame) for image, frame in zip(images, clip.frames)] == [True] * 3
    assert not alike(images[0], clip.frames[2])
    # A row's own options cannot make the page larger.
    assert page.rows[1]["media"][0]["pictures"] == [[31, 31, "1.00 s"], [31, 31, "2.40 s"], [31, 31, "3.90 s"]]


def test_the_image_list_is_that_of_training(tmp_path, world):
    scene, paths = world[10], [write_image(tmp_path / f"{n}.png", (40, 20), n) for n in range(3)]
    given = row("image", paths[:1], image_list=paths)
    del given["images"]
    page = page_of(tmp_path, [scene, given])
    image = Image.open(scene["images"][0])
    whole, _, listed = page.images(0)
    expected = masked_image_list(image, scene["critical_box"], 5)
    assert [group["title"] for group in page.rows[0]["media"]] == ["Image 1", "Other image 1", "Image list"]
    captions = [caption for *_, caption in page.rows[0]["media"][2]["pictures"]]
    assert captions == ["0 % hidden", "25 % hidden", "50 % hidden", "75 % hidden", "100 % hidden"]
    assert whole[0].size == (112, 56) and alike(whole[0], image)
    assert [alike(shown, item) for shown, item in zip(listed, expected)] == [True] * 5
    x0, y0, x1, y1 = scene["critical_box"]
    assert np.asarray(listed[4])[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].mean() < 64
    assert [(g["title"], len(g["pictures"])) for g in page.rows[1]["media"]] == [("Image 1", 1), ("Image list", 3)]
    assert page.rows[1]["problems"] == []


def test_second_media_are_shown_beside_the_rows_own(tmp_path):
    paths = [write_image(tmp_path / f"{n}.png", (40, 20), n) for n in range(2)]
    clips = [write_clip(tmp_path / f"{n}.mp4", 8, seed=n) for n in range(2)]
    rows = [
        row("image", paths[:1], rejected_images=paths[1:]) | {"rejected": None},
        row("image", paths[:1], other_images=paths[1:], other_chosen=message("assistant", "a dog.")),
        row("video", clips[:1], critical_span=[0.0, 0.8]),
        row("video", clips[:1], video_list=clips),
        row("image", paths[:1], rejected_images=paths),
    ]
    names = {name for r in rows for name in r}
    page = page_of(tmp_path, [dict.fromkeys(names) | r for r in rows], num_frames=4)
    titles = [[group["title"] for group in record.get("media", [])] for record in page.rows]
    assert (
        titles[:2] == [["Image 1", "Rejected image 1"], ["Image 1", "Other image 1"]]
        and titles[2:4] == [["Video 1", "Video list"]] * 2
    )
    assert page.rows[0]["rejected"] == page.rows[0]["chosen"] and page.rows[1]["other_chosen"] == ["a dog."]
    captions = [caption for *_, caption in page.rows[2]["media"][1]["pictures"]]
    assert captions[0] == "0 % hidden, 0.00 s" and captions[-1].startswith("100 % hidden") and len(captions) == 20
    assert np.asarray(page.images(2)[1][-1]).max() < 20 < np.asarray(page.images(2)[1][0]).max()
    assert [len(record["problems"]) for record in page.rows] == [0, 0, 0, 0, 1]
    assert "has 2 item(s), but the row has 1 image(s)" in page.rows[4]["problems"][0]


def test_the_same_data_make_the_same_bytes(tmp_path, world, monkeypatch):
    write_jsonl(world, tmp_path / "rows.jsonl")
    for name, cores in (("a.html", 1), ("b.HTM", 4)):
        monkeypatch.setattr(page_module, "usable_cores", lambda cores=cores: cores)
        write_page(tmp_path / "rows.jsonl", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.HTM").read_bytes()


def test_no_row_is_skipped(tmp_path, world):
    """Whatever is wrong with a line, a row or its files: it has its place on the page, and the error stands there."""
    bad = [
        (b'{"id": "cut off"', "line 1: not JSON"),
        (b"[1, 2]", "line 2: is a JSON list"),
        (b'{"id": "\xff"}', "line 3: byte 0xff"),
        ({"id": "lonely", "prompt": "?", "chosen": "yes", "score": 2}, "has no `rejected`"),
        (row(None, prompt=[{"role": "user", "content": 5}]), "a `content` of the type int"),
        (row(None, chosen="same", rejected="same"), "identical"),
        (row(None, chosen_phrases=[[0, 400]]), "Phrases (RRPO): chosen_phrases[0]"),
        (row(None, chosen="a <MASK> b", rejected="c"), "Phrases (RRPO): the last <MASK>"),
        ({**world[10], "critical_span": [0, 1]}, "List (LPOI): has a `critical_box` and a `critical_span`"),
    ]
    rows = [item for item, _ in bad] + [{**world[10], "critical_box": [0, 0, 500, 5]}]
    rows.append(row(None, chosen="a b", rejected="a  b"))
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    counts = write_page(tmp_path / "rows.jsonl", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    for record, (_, problem) in zip(page.rows, bad):
        assert len(record["problems"]) == 1 and problem in record["problems"][0], record
    assert page.rows[0]["raw"] == '{"id": "cut off"' and '"chosen": "yes"' in page.rows[3]["raw"]
    assert page.rows[3]["id"] == "lonely" and page.rows[3]["columns"] == [["score", 2]]
    assert page.rows[6]["chosen"] == ["a red square moves left."] and "raw" not in page.rows[6]
    assert "reaches outside" in page.rows[9]["media"][2]["error"] and page.rows[9]["problems"] == []
    assert "white space only" in page.rows[10]["notes"][0] and page.rows[10]["problems"] == []
    assert (counts.rows, counts.problem_rows, counts.media_failures) == (11, 10, 1)


def test_broken_files_are_shown_as_such(tmp_path):
    out = tmp_path / "page.html"
    (tmp_path / "a.json").write_text("[{}, ")
    write_page(tmp_path / "a.json", out)
    assert "cannot be read as JSON" in Page(out).rows[0]["problems"][0]
    (tmp_path / "b.json").write_text(json.dumps([row(None), row(None, id="second")]))
    (tmp_path / "b.json.rejected.jsonl").write_text('{"reason": "no answer", "record": {"q": 1}}\n{nonsense\n')
    (tmp_path / "summary.json").write_text("{")
    write_page(tmp_path / "b.json", out)
    page = Page(out)
    assert [record.get("id") for record in page.rows] == [None, "second"]
    assert [entry["kind"] for entry in page.rejected] == ["", "unreadable line"]
    assert page.rejected[0]["reason"] == "no answer" and "line 2: not JSON" in page.rejected[1]["reason"]
    assert page.summary[0][0] == "error" and "summary.json is not JSON" in page.summary[0][1]


def test_odd_values_stay_readable(tmp_path):
    odd = {"nan": float("nan"), "big": 2**60, "half": "\ud83d", "nothing": None, "long": list(range(20_000))}
    (record,) = page_of(tmp_path, [row(None, **odd, deep={"a": float("inf")})]).rows
    assert record["columns"] == [["nan", "nan"], ["big", str(2**60)], ["half", "\ud83d"]]
    (long, text), deep = record["more"]
    assert long == "long" and text.endswith("characters in all)") and len(text) < 20_100
    assert deep == ["deep", '{\n "a": "inf"\n}']


def test_nothing_in_the_data_is_markup(tmp_path):
    evil = '</script><script>window.hacked=1</script><!--<script>"><img src=x onerror=alert(1)>\u2028{{ 7*7 }}'
    columns = {"id": evil, "source": evil, evil: evil, "x" + evil: [evil]}
    folder = tmp_path / "<b>{{ 7*7 }}"
    write_jsonl([{"id": evil, "kind": evil, "reason": evil, evil: evil}], folder / "rejected.jsonl")
    page = page_of(folder, [row(None, chosen=evil + "1", rejected=evil + "2", **columns)])
    assert page.rows[0]["id"] == evil and "".join(page.rows[0]["chosen"]) == evil + "1"
    assert page.rejected[0]["kind"] == evil
    skeleton = BLOCK.sub("", page.html)
    assert len(re.findall("<script", page.html)) == len(BLOCK.findall(page.html)) + 1
    assert not re.search("hacked|onerror|<b>", skeleton)
    assert "&lt;b&gt;{{ 7*7 }}" in re.findall("<h1>.*", skeleton)[0]
    assert all("<" not in text for _, _, text in BLOCK.findall(page.html))


def test_parquet_and_saved_datasets_with_media_inside(tmp_path, world):
    paths = [row["images"][0] for row in world[10:12]]
    inside = [[{"path": None, "bytes": Path(path).read_bytes()}] for path in paths]
    rows = [row("image", items, id=f"s{n}", score=n / 2) for n, items in enumerate(inside)]
    dataset = Dataset.from_list(rows).cast_column("images", List(ImageFeature()))
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(str(tmp_path / "folder" / "test.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    for name, split in (("folder", "test"), ("saved", "train")):
        write_page(tmp_path / name, tmp_path / "page.html", split=split)
        page = Page(tmp_path / "page.html")
        assert [(r["id"], r["columns"]) for r in page.rows] == [("s0", [["score", 0.0]]), ("s1", [["score", 0.5]])]
        assert alike(page.images(1)[0][0], Image.open(paths[1]))


HELD_OUT = {"task": "yes_no", "question": "Is there a dog?", "answer": "yes", "images": ["a.png"]}
RESULT = {"contestant": "base", "task": "preference", "id": "1", "chosen_logp": -3.0}


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (HELD_OUT, "It looks like a held-out row: `trl-vpo evaluate --data FILE`"),
        ({"question": "?", "answer": "a", "images": ["a.png"]}, "`trl-vpo generate` makes pairs of such rows"),
        ({"question_id": 1, "image": "a.png", "text": "?", "label": "yes"}, "`trl-vpo import pope IN OUT`"),
        (RESULT, "a result of `trl-vpo evaluate`, and no row"),
    ],
)
@pytest.mark.parametrize("limit", [None, 3])
def test_what_is_no_preference_data_is_called_so(tmp_path, example, says, limit):
    """Also in the folder that a run wrote. A few such rows between pairs have their place on the page."""
    data, of = write_jsonl([example] * 20, tmp_path / "rows.jsonl"), f"first {limit}" if limit else 20
    for dataset in (data, tmp_path):
        with pytest.raises(UserError, match=f"no preference data: of its {of} rows, none has .*{says}"):
            write_page(dataset, tmp_path / "page.html", limit=limit)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert len(page_of(tmp_path, [example, example, row(None)]).rows) == 3


def test_limit_and_media_root(tmp_path, world):
    rows = [{**row, "videos": [Path(row["videos"][0]).name]} for row in world[:3]]
    page = page_of(tmp_path, rows, limit=2, media_root=Path(world[0]["videos"][0]).parent)
    assert len(page.rows) == 2 and page.counts["limited"] and page.counts["media_failures"] == 0
    assert not page_of(tmp_path, rows, limit=3).counts["limited"]
    assert page_of(tmp_path, []).rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"split": "test"}, "has no split 'test'; it has train"),
        ({"dataset": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"out": "rows.jsonl"}, "rows.jsonl: the page is HTML. Let its name end in .html or .htm"),
        ({"out": "folder.html"}, "is a folder"),
    ],
)
def test_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl([row(None)], tmp_path / "rows.jsonl")
    (tmp_path / "page.html").write_text("the last one")
    (tmp_path / "folder.html").mkdir()
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        write_page(**{"dataset": "rows.jsonl", "out": "page.html"} | options)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()} == before
