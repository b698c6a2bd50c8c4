"""Annotated inputs from files of every kind, with media of every kind, brought into a form that JSON holds."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, Video
from helpers import write_clip, write_image
from PIL import Image as PILImage

from trl_vpo.data.inputs import digest, load_media, portable, read_inputs
from trl_vpo.data.rows import read_row
from trl_vpo.errors import DatasetError, MediaError, RunError
from trl_vpo.generate.pipeline import training_row
from trl_vpo.media.load import VideoOptions, load_image, load_video

FOUR = VideoOptions(num_frames=4)


@pytest.fixture
def folder(tmp_path):
    """media/: an image, a clip and a folder of three frames."""
    (tmp_path / "media/frames").mkdir(parents=True)
    write_image(tmp_path / "media/a.png")
    write_clip(tmp_path / "media/a.mp4")
    for i in range(3):
        write_image(tmp_path / f"media/frames/{i}.png", seed=i)
    return tmp_path


def read(folder, source, **options):
    return read_inputs(str(folder / source), **{"media_folder": folder / "run/media", **options})


def read_rows(folder, *rows, **options):
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(folder, "in.jsonl", **options)


def pixels(source) -> np.ndarray:
    return np.asarray(load_image(source))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_jsonl(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [
        {"id": "a", "question": "What?", "answer": "this", "videos": ["media/a.mp4"], "options": {"x": 1, "y": None}},
        {"id": None, "question": "And?", "answer": None, "videos": [str(folder / "media/a.mp4")], "options": None},
    ]
    inputs = read_rows(folder, *rows)
    assert (len(inputs), inputs.ids) == (2, ["a", "row-000001"])
    first, second = inputs
    assert (first.id, first.images, first.videos) == ("a", (), (str(folder / "media/a.mp4"),))
    assert first.example == rows[0] | {"options": {"x": 1}}  # without Nones, and otherwise as it is
    assert second.example == {"question": "And?", "videos": rows[1]["videos"]}
    media = load_media(first, FOUR)
    assert (media.images, media.videos[0].frames.shape) == ((), (4, 64, 64, 3))
    assert inputs[-1] == second and inputs[1:][0] == second and inputs[:1].ids == ["a"]
    with pytest.raises(IndexError):
        inputs[2]
    assert not (folder / "run").exists()


def test_local_formats_agree(folder):
    data = Dataset.from_list([{"id": f"{i}", "image": str(folder / "media/a.png"), "n": i} for i in range(3)])
    data.to_parquet(folder / "in.parquet")
    data.to_json(folder / "in.json")
    data.save_to_disk(folder / "saved")
    (folder / "split").mkdir()
    data.to_json(folder / "split/test.jsonl")
    sources = [read(folder, name) for name in ("in.parquet", "in.json", "saved")]
    sources.append(read(folder, "split", split="test"))
    assert all(list(inputs) == list(sources[0]) for inputs in sources)
    assert len({digest(inputs) for inputs in sources}) == 1
    assert sources[0][2].example == {"id": "2", "image": str(folder / "media/a.png"), "n": 2}
    with pytest.raises(DatasetError, match="no split 'train'; it has test"):
        read(folder, "split")
    Dataset.from_dict({"id": []}).to_parquet(folder / "in.parquet")
    with pytest.raises(DatasetError, match=r"in\.parquet cannot be read as rows: .* no data"):
        read(folder, "in.parquet")


def test_ids(folder):
    assert read_rows(folder, {"id": 7}, {"id": 8}, {"id": None}).ids == ["7", "8", "row-000002"]
    with pytest.raises(RunError, match="rows 1 and 2 of the inputs both have the id 'row-000002'"):
        read_rows(folder, {"id": "a"}, {"id": "row-000002"}, {"id": ""})


def test_many_rows_are_not_read(folder):
    """A hundred thousand: nothing of a row is touched before it is asked for."""
    inputs = read_rows(folder, *({"id": f"c{i}", "video": f"no/{i}.mp4", "q": "What?"} for i in range(100_000)))
    inputs.examples = None  # what every reading of a row goes through
    assert len(inputs) == 100_000 and inputs.ids[99_999] == "c99999"
    del inputs.examples
    part = inputs[50_000:]
    assert (len(part), part[3].id, part[3].example["video"]) == (50_000, "c50003", "no/50003.mp4")
    assert len(digest(inputs)) == 32


def test_digest(folder):
    def of(*rows, raw=b"abc"):
        data = [{"image": {"bytes": raw + bytes([i]), "path": None}, **row} for i, row in enumerate(rows)]
        features = Features({"image": Image(), "id": Value("string"), "q": Value("string")})
        Dataset.from_list(data, features=features).to_parquet(folder / "in.parquet")
        return digest(read(folder, "in.parquet"))

    rows = [{"id": f"{i}", "q": "What?"} for i in range(20)]
    same, rest = of(*rows), rows[:-1]
    assert same == of(*rows)
    others = [of(*rows, raw=b"abd"), of(*rest), of(*rows[::-1])]
    others += [of(*rest, rows[-1] | change) for change in ({"q": "Why?"}, {"id": "20"})]
    assert len({same, *others}) == 6


# --- media --------------------------------------------------------------------------------------------------------


def test_media_in_parquet(folder):
    """Images and videos as `datasets` stores them, by bytes and by path; nothing needs torchcodec."""
    features = Features({"images": List(Image()), "video": Video(), "id": Value("string")})
    image, clip = folder / "media/a.png", folder / "media/a.mp4"
    data = {
        "images": [[{"bytes": image.read_bytes(), "path": "x.png"}, {"bytes": None, "path": str(image)}]] * 2,
        "video": [{"bytes": clip.read_bytes(), "path": None}, {"bytes": None, "path": str(clip)}],
        "id": ["a", "b"],
    }
    Dataset.from_dict(data, features=features).to_parquet(folder / "in.parquet")
    inputs = read(folder, "in.parquet")
    digest(inputs)
    assert not (folder / "run").exists()
    first, second = inputs
    kept = folder / "run/media"
    assert first.images == (str(next(kept.glob("*.png"))), str(image))
    assert first.videos == (str(next(kept.glob("*.mp4"))),)
    assert second.images == first.images and second.videos == (str(clip),)
    assert len(list(kept.iterdir())) == 2  # the same contents are kept once
    assert Path(first.images[0]).read_bytes() == image.read_bytes()
    media = load_media(first, FOUR)
    assert np.array_equal(np.asarray(media.images[0]), pixels(image)) and len(media.images) == 2
    assert np.array_equal(media.videos[0].frames, load_video(clip, FOUR).frames)
    row = training_row(first, prompt="What?", chosen="a", rejected="b", generated_by={})
    again = read_row(json.loads(json.dumps(row)))
    assert (again.images, again.videos) == (list(first.images), list(first.videos))


@pytest.mark.parametrize("damaged", [False, True])
def test_media_stay_as_they_are_without_a_folder(folder, damaged):
    raw = b"\x89PNG garbage" if damaged else (folder / "media/a.png").read_bytes()
    data = {"image": [{"bytes": raw, "path": None}]}
    Dataset.from_dict(data, features=Features({"image": Image()})).to_parquet(folder / "in.parquet")
    (row,) = read(folder, "in.parquet", media_folder=None)
    if damaged:
        with pytest.raises(MediaError, match="is not a readable image"):
            load_media(row, FOUR)
    else:
        assert load_media(row, FOUR).images[0].size == (56, 56)
        assert load_media(row, VideoOptions(max_pixels=100)).images[0].size == (10, 10)
    assert not (folder / "run").exists()


def test_frames_and_options(folder):
    frames = [f"media/frames/{i}.png" for i in (2, 0, 1)]
    videos = {"video": frames, "frames_fps": 4.0}, {"video": frames[:2], "frames_fps": None}
    inputs = read_rows(folder, *({"videos": [video]} for video in videos), media_root=str(folder))
    full = [str(folder / frame) for frame in frames]
    assert inputs[0].videos == ({"video": full, "frames_fps": 4.0},)
    assert inputs[1].videos == ({"video": full[:2]},)  # a dictionary in every row, as datasets wants it
    clip = load_media(inputs[0], VideoOptions(num_frames=3)).videos[0]
    assert clip.timestamps.tolist() == [0, 0.25, 0.5]
    assert np.array_equal(clip.frames[0], pixels(full[0]))

    rows = [{"videos": [{"path": "media/a.mp4", "video_start": 0.5}]}, {"videos": [{"path": "media/frames"}]}]
    inputs = read_rows(folder, *rows, media_root=str(folder))
    assert inputs[0].videos == ({"path": str(folder / "media/a.mp4"), "video_start": 0.5},)
    assert load_media(inputs[0], FOUR).videos[0].timestamps[0] == pytest.approx(0.5)
    assert load_media(inputs[1], FOUR).videos[0].total_frames == 3

    (row,) = read_rows(folder, {"videos": [frames]}, media_root=str(folder))
    assert row.videos == (full,)


def test_media_in_memory(folder):
    image = PILImage.open(folder / "media/a.png")
    kept = folder / "kept"
    path = portable(image, kept)
    assert np.array_equal(pixels(path), np.asarray(image)) and portable(image, kept) == path
    clip = [PILImage.new("RGB", (6, 4), (i, i, i)) for i in range(3)]
    paths = portable({"video": clip, "frames_fps": 2}, kept)["video"]
    assert [int(pixels(p)[0, 0, 0]) for p in paths] == [0, 1, 2]
    assert {p.suffix for p in kept.iterdir()} == {".png"}
    jpeg = io.BytesIO()
    image.convert("RGB").save(jpeg, "JPEG")
    assert portable(memoryview(jpeg.getvalue()), kept).endswith(".jpg")
    assert portable(b"something else", kept).endswith(".bin")
    assert portable({"image": path, "bytes": None, "type": "image"}, kept) == path


def test_paths(folder, monkeypatch):
    monkeypatch.chdir(folder / "media")
    expected = str(folder / "media/a.png")
    for given in ("a.png", "./a.png", f"file://{expected}", "../media/a.png", Path("a.png")):
        assert portable(given, None) == expected, given
    assert portable("media/a.png", None, media_root="..") == expected
    (folder / "blob").write_bytes((folder / "media/a.png").read_bytes())
    os.symlink(folder / "blob", folder / "media/link.png")
    assert portable("link.png", None) == str(folder / "media/link.png")  # its name still says what it is


def test_media_that_cannot_be_used_fail_when_loaded(folder):
    """No row ends the reading of the others; media outside of `media_root` are refused, through links too."""
    os.symlink(folder / "media/a.png", folder / "media/frames/outside.png")
    (folder / "empty.png").touch()
    rows = [
        ({"image": "../a.png"}, r"\.\./a\.png lies outside of media_root"),
        ({"image": str(folder / "media/a.png")}, "lies outside of media_root"),
        ({"image": "outside.png"}, "lies outside of media_root"),
        ({"video": ".."}, "lies outside of media_root"),
        ({"image": "none.png"}, r"none\.png does not exist"),
        ({"image": "https://host/a.png"}, "https:// URL: nothing is fetched"),
        ({"images": ["0.png", None]}, r"`images` has nothing at position \[1\]"),
        ({"images": "0.png"}, "`images` must be a list, got str. One item goes into `image`"),
        ({"images": ["0.png"], "image": "0.png"}, "both `images` and `image`"),
        ({"video": {"path": None}}, "names no image or video"),
    ]
    for example, message in rows:
        (row,) = read_rows(folder, example, media_root=str(folder / "media/frames"))
        with pytest.raises(MediaError, match=message):
            load_media(row, FOUR)
    (row,) = read_rows(folder, {"image": str(folder / "empty.png")})
    with pytest.raises(MediaError, match="is empty"):
        load_media(row, FOUR)
    with pytest.raises(MediaError, match="<bytes, 0 long> is empty"):
        portable(b"", folder)
    with pytest.raises(MediaError, match="<int> is neither an image nor a video"):
        portable(3, folder)


def test_a_media_folder_that_cannot_be_written(folder):
    (folder / "run").write_text("a file")
    with pytest.raises(RunError, match=r"run/media/.* cannot be written \(.*\)\. Free space"):
        portable(b"abc", folder / "run/media")
