"""Rows as they are stored: media columns of `datasets`, streams, transforms, and names of columns."""

import json

import pytest
from datasets import Dataset, Features, Image, Json, List, Value, Video, load_dataset
from helpers import row, write_image
from prepared import prepare

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.inputs import Inputs
from trl_vpo.data.raw_rows import raw_rows
from trl_vpo.data.rows import ROW_INDEX
from trl_vpo.errors import RowError
from trl_vpo.report.view.data import read_examples


def as_media(rows):
    """A dataset whose media columns are `datasets.Video` and `datasets.Image`."""
    base = Dataset.from_list(rows)
    kinds = {name: List(kind) for name, kind in (("videos", Video()), ("images", Image())) if name in base.features}
    return base.cast(Features({**base.features, **kinds}))


def assert_same_media(example, plain, processor, **where):
    """A prepared row gives the collator what the plain one gives."""
    want = PreferenceCollator(processor).encode(plain).trunks[0].media
    media = PreferenceCollator(processor, **where).encode(example).trunks[0].media
    assert want and all((media[key] == value).all() for key, value in want.items())


def test_datasets_video_and_image_columns(good, processor, tmp_path):
    """With the bytes inside Arrow, they reach the collator undecoded."""
    video = prepare(as_media([row("video", [good])] * 2), processor, tmp_path, check_media="decode")
    assert video[0]["videos"][0]["path"] == good
    picture = write_image(tmp_path / "a.png")
    image = prepare(as_media([row("image", [picture])]), processor, tmp_path)
    assert_same_media(image[0], row("image", [picture]), processor)


@pytest.mark.parametrize("stored", ["arrow", "parquet"])
def test_videos_of_a_stream_are_not_decoded_by_datasets(good, processor, tmp_path, stored):
    """That needs torchcodec; images of a stream stay images."""
    picture = write_image(tmp_path / "a.png")
    rows = [row("video", [good], images=None), row("image", [picture], videos=None)]
    stream, path = as_media(rows).to_iterable_dataset(), str(tmp_path / "rows.parquet")
    if stored == "parquet":
        as_media(rows).to_parquet(path)
        stream = load_dataset("parquet", data_files=path, split="train", streaming=True)
    clip, shown = prepare(stream, processor, tmp_path)
    assert clip[ROW_INDEX] == 0 and clip["videos"][0]["path"] == good and shown["images"][0].size == (56, 56)
    assert_same_media(clip, rows[0], processor)
    assert_same_media(shown, rows[1], processor)


@pytest.mark.parametrize("stream", [False, True])
def test_image_columns_start_at_media_root(processor, tmp_path, stream):
    picture = write_image(tmp_path / "a.png")
    data = as_media([row("image", ["a.png"])])
    data = data.to_iterable_dataset() if stream else data
    (example,) = prepare(data, processor, tmp_path, media_root=str(tmp_path))
    assert_same_media(example, row("image", [picture]), processor, media_root=str(tmp_path))


def test_iterable_datasets_are_checked_at_their_first_row(good, processor, tmp_path):
    rows = [row("video", [str(tmp_path / "x.mp4")]), row("video", [good])]
    with pytest.raises(RowError, match=r"row 0: .*x\.mp4"):
        prepare(Dataset.from_list(rows).to_iterable_dataset(), processor, tmp_path)
    stream = prepare(Dataset.from_list(rows[::-1]).to_iterable_dataset(), processor, tmp_path)
    assert [example["_row_index"] for example in stream] == [0, 1]
    with pytest.raises(ValueError, match="IterableDataset"):
        prepare(Dataset.from_list(rows).to_iterable_dataset(), processor, tmp_path, on_bad_media="skip")


def test_jsonl_with_rows_of_different_kinds(good, processor, tmp_path):
    picture = write_image(tmp_path / "a.png")
    rows = [row("image", [picture], id="i"), row("video", [good], id="v"), row(None, id="t")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"images": None, "videos": None, **r}) + "\n" for r in rows))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    data = prepare(data, processor, tmp_path)
    batch = PreferenceCollator(processor)([data[i] for i in range(3)])
    kinds = {"image_grid_thw", "pixel_values"}, {"pixel_values_videos", "video_grid_thw"}, set()
    assert tuple(map(set, batch["media"])) == kinds
    assert batch["names"] == ["row 0 (id 'i')", "row 1 (id 'v')", "row 2 (id 't')"]


def test_rows_are_numbered_as_the_user_sees_them(good, processor, tmp_path):
    data = Dataset.from_list([row("video", [good], id=str(i), _row_index=7) for i in range(5)]).shuffle(seed=1)
    numbered = prepare(data, processor, tmp_path)
    assert numbered["_row_index"] == list(range(5)) and numbered["id"] == data["id"]
    rows = [row(None, _row_index=7), row(None, chosen="", _row_index=8)]
    with pytest.raises(RowError, match="row 1: the chosen response is empty"):  # a column of the user's own
        prepare(rows, processor, tmp_path)


def test_columns_that_the_trainer_would_drop_are_named(processor, tmp_path):
    with pytest.raises(RowError, match=r"a column `image_lists`, which is not read\. Did you mean `image_list`"):
        prepare([row(None, image_lists=None), row(None, image_lists=["a.png"])], processor, tmp_path)
    assert len(prepare([row(None, image_lists=None, score=1.0)], processor, tmp_path)) == 1
    with pytest.raises(RowError, match=r"row 0: has no `prompt`.*`question` are not read"):
        prepare([{"question": "What?", "chosen": "a", "rejected": "b"}], processor, tmp_path)


@pytest.mark.parametrize("unused", [False, True])
def test_a_transform_gets_the_columns_that_it_gets_in_training(unused, images, processor, tmp_path):
    def shown(batch):
        rows = [row("image", [path]) for path in batch["file"]]
        return {name: [example[name] for example in rows] for name in rows[0]}

    data = Dataset.from_dict({"file": images, "id": ["a", "b", "c"]}).with_transform(shown)
    if unused:
        with pytest.raises(RowError, match=r"rows 0 to .*KeyError: 'file'\)\. It was given `id`\. Set remove_unused"):
            prepare(data, processor, tmp_path)
        return
    data = prepare(data, processor, tmp_path, remove_unused_columns=False)
    assert data[1][ROW_INDEX] == 1 and data[[0, 2]][ROW_INDEX] == [0, 2]
    collator = PreferenceCollator(processor)
    assert collator([data[2]])["names"] == ["row 2"]
    again = prepare(data.select([1, 2]), processor, tmp_path, remove_unused_columns=False)  # as another trainer would
    assert collator([again[1]])["names"] == ["row 1"] and again[1]["images"] == data[2]["images"]


def test_json_beside_a_file_is_read(tmp_path):
    """In training, in the inputs of other commands, and on the page of `trl-vpo view`."""
    features = Features(images=List({"image": Image(), "crop": Json()}), files=List(Json()), t=Value("string"))
    picture, files = {"image": {"bytes": b"not decoded", "path": None}, "crop": [1, 2]}, ["a.png", {"path": "b.png"}]
    want = {"images": [picture], "files": files, "t": "[3]"}
    data = Dataset.from_list([want, want], features=features)
    data.save_to_disk(tmp_path / "saved")
    assert list(raw_rows(data)) == Inputs(data, ["0", "1"]).examples(0, 2) == [want, want]
    assert list(read_examples(tmp_path / "saved", "train")) == [want, want]
    assert list(raw_rows(data.select_columns(["t", "images"]), 1, media=())) == [{"t": "[3]"}]
