"""Media of imported rows: embedded pictures, LPOI's image lists, parts of videos, MMPR's folders, what is missing."""

import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from helpers import write_clip, write_image
from import_records import FACTORY, LPOI, MMPR, PAIRS, RECORDS, RLAIF_V, RLHF_V, RRPO, VIDEOCHAT2, import_rows
from PIL import Image

from trl_vpo.data.importers import convert
from trl_vpo.data.inputs import read_inputs
from trl_vpo.data.rows import read_row
from trl_vpo.data.sources import named_splits
from trl_vpo.errors import ImportFormatError, RunError
from trl_vpo.media.images import load_image
from trl_vpo.media.load import VideoOptions, load_video
from trl_vpo.testbed.rows import write_jsonl


def encoded(shade: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(data, kind)
    return data.getvalue()


def rows_of(path) -> list[dict]:
    return list(named_splits(str(path), ["train"])["train"])


def shades(rows) -> list[int]:
    return [int(np.asarray(load_image(row["images"][0]))[0, 0, 0]) for row in rows]


# --- embedded pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "column"), [("rlhf-v", "image"), ("rlaif-v", "image"), ("llamafactory", "images")])
def test_pictures_in_parquet(tmp_path, fmt, column):
    """Four rows with three pictures, one of which two rows share under different names."""
    records = []
    for n, shade in enumerate([10, 20, 10, 30]):
        picture = {"bytes": encoded(shade), "path": f"{n}.png"}
        records.append(PAIRS[fmt] | {"id" if fmt == "llamafactory" else "idx": n, column: picture})
        if fmt == "llamafactory":
            turn = {"from": "human", "value": "<image>What is it?"}
            records[n] |= {"images": [picture], "conversations": [turn]}
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    counts = convert(fmt, tmp_path / "in.parquet", tmp_path / "new/train.jsonl")
    files = sorted((tmp_path / "new/train_media").iterdir())
    assert len(files) == 3 and {file.suffix for file in files} == {".png"}
    assert {file.read_bytes() for file in files} == {encoded(shade) for shade in (10, 20, 30)}
    assert counts.left_to_do == [f"3 embedded pictures are in {tmp_path / 'new/train_media'}."]
    assert (len(counts.media), len(counts.missing_media), counts.rejected) == (3, 0, 0)
    rows = rows_of(tmp_path / "new/train.jsonl")
    assert shades(rows) == [10, 20, 10, 30]
    assert len(read_row(rows[0]).images) == 1
    before = [file.stat().st_mtime_ns for file in files]
    convert(fmt, tmp_path / "in.parquet", tmp_path / "new/train.jsonl")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_pictures_in_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(noise).save(jpeg, "JPEG")
    texts = [base64.b64encode(data).decode() for data in (encoded(10), encoded(20), jpeg.getvalue())]
    images = [{"bytes": texts[0]}, f"data:image/png;base64,{texts[1]}", texts[2]]
    records = [RLHF_V | {"idx": n, "image": image} for n, image in enumerate(images)]
    Path("in.json").write_text(json.dumps(records))
    convert("rlhf-v", "in.json", "train.jsonl")
    rows = rows_of("train.jsonl")
    assert shades(rows[:2]) == [10, 20]
    assert all(Path(row["images"][0]).parent == tmp_path / "train_media" for row in rows)
    assert Path(rows[2]["images"][0]).read_bytes() == jpeg.getvalue()


def test_a_bad_record_writes_no_picture(tmp_path):
    picture = {"bytes": base64.b64encode(encoded(1)).decode()}
    records = [RLAIF_V | {"image": picture, "chosen": "A \ud83d"}, RLAIF_V]
    counts = convert("rlaif-v", write_jsonl(records, tmp_path / "in.jsonl"), tmp_path / "out.jsonl", on_bad="skip")
    assert (counts.written, counts.rejected) == (1, 1) and not (tmp_path / "out_media").exists()


def test_pictures_need_a_folder_that_can_be_made(tmp_path):
    record = RLAIF_V | {"image": {"bytes": base64.b64encode(encoded(1)).decode()}}
    path = write_jsonl([record], tmp_path / "in.jsonl")
    with pytest.raises(RunError, match=r"in\.jsonl/out_media/.* cannot be written \(Not a directory\)\.") as error:
        convert("rlaif-v", path, path / "out.jsonl")
    assert "continues" not in str(error.value)  # an import begins anew


# --- LPOI -----------------------------------------------------------------------------------------------------------


def test_lpoi_keeps_a_list(tmp_path):
    others = ["data/m/1.jpg", "data/m/2.jpg"]
    records = [LPOI | {"image_list": others}, LPOI | {"image_list": [LPOI["img_path"], *others]}]
    counts = convert("lpoi", write_jsonl(records, tmp_path / "in.jsonl"), tmp_path / "out.jsonl", media_root="/d")
    for row in rows_of(tmp_path / "out.jsonl"):
        assert row["image_list"] == ["/d/data/images/1.jpg", "/d/data/m/1.jpg", "/d/data/m/2.jpg"]
        assert read_row(row, media_form="ranking").media_list == [([item], []) for item in row["image_list"]]
    assert (len(counts.media), len(counts.missing_media), counts.ignored_fields) == (3, 3, [])


def test_lpoi_finds_the_masked_images_of_the_release(tmp_path):
    folders = ["images", *(f"ours_cmask_until_list5/ours_cmask_until{share}" for share in (25, 50, 75, 100))]
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
        write_image(tmp_path / "data" / folder / "1.jpg")
    write_image(tmp_path / "data/images/2.jpg")  # without masked ones
    records = [LPOI, LPOI | {"img_path": "./data/images/2.jpg"}]
    path = write_jsonl(records, tmp_path / "in.json")
    counts = convert("lpoi", path, tmp_path / "out.jsonl", media_root=tmp_path)
    first, second = rows_of(tmp_path / "out.jsonl")
    assert first["image_list"] == [str(tmp_path / "data" / folder / "1.jpg") for folder in folders]
    assert len(read_row(first, media_form="ranking").media_list) == 5
    assert second["image_list"] is None
    (note,) = counts.left_to_do
    out = tmp_path / "out.jsonl"
    assert note.startswith(f"1 of 2 rows have no image list: `trl-vpo generate lpoi --dataset_name {out}` finds")


def test_an_image_alone_is_no_list(tmp_path):
    records = [LPOI | {"image_list": [LPOI["img_path"]]}, LPOI | {"image_list": ["b.jpg"]}]
    counts = convert("lpoi", write_jsonl(records, tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    lists = {row["id"]: row["image_list"] for row in rows_of(tmp_path / "out.jsonl")}
    assert lists == {"in-1": None, "in-2": [LPOI["img_path"], "b.jpg"]}
    assert counts.left_to_do[-1].startswith("1 of 2 rows have no image list")


# --- MMPR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["beside", "above", "media_root"])
def test_mmpr_meta_names_the_annotations(tmp_path, place, monkeypatch):
    """Paths in meta.json begin with the dataset's folder, in which meta.json lies."""
    (tmp_path / "MMPR/annotations").mkdir(parents=True)
    meta = {}
    for name in ("vqa", "ocr"):
        write_jsonl([MMPR, MMPR], tmp_path / f"MMPR/annotations/{name}.jsonl")
        meta[name] = {"root": f"MMPR/images/{name}", "annotation": f"MMPR/annotations/{name}.jsonl", "repeat_time": 1}
    path = tmp_path / "MMPR/meta.json"
    path.write_text(json.dumps(meta, indent=2))
    options = {}
    if place == "above":
        path = path.rename(tmp_path / "meta.json")
    elif place == "media_root":
        options["media_root"] = tmp_path
        path = path.rename(tmp_path / "MMPR/annotations/my_meta.json.gz")
        path.write_bytes(gzip.compress(path.read_bytes()))
    rows = [(row["id"], row["images"]) for row in import_rows("mmpr", path, **options)]
    assert rows == [(f"{name}-{n}", [str(tmp_path / f"MMPR/images/{name}/1.png")]) for name in meta for n in (1, 2)]
    with pytest.raises(ImportFormatError, match=r"ocr\.jsonl: input and output are the same file"):
        convert("mmpr", path, tmp_path / "MMPR/annotations/ocr.jsonl", **options)
    meta["vqa"]["repeat_time"] = 2
    path = tmp_path / "MMPR/meta.json"
    path.write_text(json.dumps(meta))
    ids = [row["id"] for row in import_rows("mmpr", path, media_root=tmp_path)]
    assert ids == ["vqa-1", "vqa-2", "vqa-1.2", "vqa-2.2", "ocr-1", "ocr-2"]
    for times in (0.5, 1.5, 0, "2", None):
        path.write_text(json.dumps(meta | {"vqa": meta["vqa"] | {"repeat_time": times}}))
        with pytest.raises(
            ImportFormatError, match=f"meta.json: `repeat_time` of `vqa` is {times!r}. Write how often"
        ):
            list(import_rows("mmpr", path, media_root=tmp_path))
    path.write_text(json.dumps(meta))
    (tmp_path / "MMPR/annotations/ocr.jsonl").unlink()
    with pytest.raises(ImportFormatError, match=r"`ocr` names MMPR/annotations/ocr\.jsonl, which is not in "):
        list(import_rows("mmpr", path, **options))


# --- videos, and what is left to do ---------------------------------------------------------------------------------


def test_parts_of_videos_beside_whole_ones(tmp_path):
    write_clip(tmp_path / "a.mp4", frames=40)
    records = [VIDEOCHAT2 | {"video": "a.mp4", "sample_id": 1}]
    records.append(records[0] | {"start": 1, "end": 2, "sample_id": 2})
    path = write_jsonl(records, tmp_path / "in.jsonl")
    convert("videochat2", path, tmp_path / "out.jsonl", media_root=tmp_path)
    whole, part = rows_of(tmp_path / "out.jsonl")
    ends = [load_video(read_row(row).videos[0], VideoOptions(num_frames=4)).timestamps[-1] for row in (whole, part)]
    assert ends[0] > 3 and 1 < ends[1] <= 2
    paths = [row.videos[0] for row in read_inputs(str(tmp_path / "out.jsonl"))]
    assert paths == [{"path": str(tmp_path / "a.mp4")}, part["videos"][0]]
    loaded = load_dataset("json", data_files=str(tmp_path / "out.jsonl"), split="train")
    assert loaded[1]["videos"] == part["videos"]


@pytest.mark.parametrize("fmt", ["videochat2", "videochat2-it", "questions", "llava-video", "llava-hound-qa"])
def test_parts_of_videos_beside_images(tmp_path, fmt):
    image = RECORDS[fmt] | {"image": "1.jpg"}
    part = RECORDS[fmt] | {"video": "a.mp4", "start": 1, "end": 2.5}
    del image["video"]
    counts = convert(fmt, write_jsonl([image, part], tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert counts.read == 2 and not {"start", "end"} & set(counts.ignored_fields)
    rows = rows_of(tmp_path / "out.jsonl")
    media = [[{"path": "a.mp4", "video_start": 1.0, "video_end": 2.5}], ["1.jpg"]]
    assert all(row["images"] == media[1] or row["videos"] == media[0] for row in rows)


def test_a_part_behind_many_whole_videos(tmp_path):
    """`load_dataset("json")` takes the types of start and end from its first chunk."""
    records = [VIDEOCHAT2 | {"sample_id": n} for n in range(60)]
    records += [VIDEOCHAT2 | {"sample_id": 60, "start": 1, "end": 2}, VIDEOCHAT2 | {"start": 0.5, "end": 2.5}]
    convert("videochat2", write_jsonl(records, tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    cache = str(tmp_path / "cache")
    files = str(tmp_path / "out.jsonl")
    loaded = load_dataset("json", data_files=files, split="train", cache_dir=cache, chunksize=4000)
    assert len(loaded) == 62 and loaded[-1]["videos"][0]["video_end"] == 2.5


@pytest.mark.parametrize(
    ("fmt", "records", "options", "notes"),
    [
        ("rrpo", [RRPO], {}, ["Missing media, for example video.mp4. Relative paths start here: --media_root FOLDER"]),
        (
            "rrpo",
            [RRPO],
            {"media_root": "/d"},
            ["Missing media, for example /d/video.mp4. Relative paths were joined to /d: --media_root FOLDER names"],
        ),
        (
            "rrpo",
            [RRPO | {"video": "https://host/a.mp4"}, RRPO | {"answer_masked": None, "pred_masked": None}],
            {"media_root": "https://host"},
            [
                "URLs, for example https://host/a.mp4: nothing is fetched here",
                "1 of 2 rows mark no phrases: RRPO will find them by a word diff.",
            ],
        ),
        ("lpoi", [LPOI], {}, ["Missing media", "1 of 1 rows have no image list: `trl-vpo generate lpoi "]),
        ("llamafactory", [FACTORY | {"images": [__file__, __file__]}], {}, []),
    ],
)
def test_what_is_left_to_do(tmp_path, fmt, records, options, notes):
    path = write_jsonl(records, tmp_path / "in.jsonl")
    left = convert(fmt, path, tmp_path / "out.jsonl", **options).left_to_do
    assert len(left) == len(notes) and all(line.startswith(note) for line, note in zip(left, notes)), left
