"""Local files of rows: every one is read or named, whole, and with the values that it holds."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pytest
from datasets import Dataset

from trl_vpo.data import json_files
from trl_vpo.data.sources import local_splits, named_splits
from trl_vpo.errors import DatasetError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, split="train", **more):
    return named_splits(str(path), [split], **more)[split]


TEXT = {"prompt": "When?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("streaming", [False, True])
def test_values_are_those_of_the_file(tmp_path, streaming):
    """Columns that begin late, change their type, hold dates, numbers as texts, or dicts of different keys."""
    rows = [
        {"chosen": "2024-01-05", "late": None, "score": 1, "content": "42", "parts": [{"type": "image"}]},
        {"chosen": "2024-01-06T10:00:00Z", "score": 2.5, "content": ["x", 1], "parts": [{"type": "text", "n": 1}]},
        {"chosen": "2024-01-07", "late": "here", "score": "3", "content": "true", "parts": [], "args": {"a": None}},
        {"chosen": "7", "late": "x", "score": None, "content": None, "parts": None, "args": {"b": {"c": [1, None]}}},
    ]
    read = list(load(write(tmp_path / "train.jsonl", *rows), streaming=streaming))
    columns = dict.fromkeys(key for row in rows for key in row)
    assert [row | dict.fromkeys(columns - row.keys()) for row in read] == [
        dict.fromkeys(columns) | row for row in rows
    ]


def test_a_column_that_begins_after_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "ROWS_AT_ONCE", 10)
    rows = [TEXT | {"id": i} for i in range(95)] + [TEXT | {"id": 0.5, "videos": ["a.mp4"]}]
    data = load(write(tmp_path / "train.jsonl", *rows))
    assert len(data) == 96 and data[95]["videos"] == ["a.mp4"] and data[0]["videos"] is None
    assert data["id"][:2] == [0, 1] and data[95]["id"] == 0.5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "caf\xe9"}', r"line 3: byte 0xe9 behind '\{\"prompt\": \"caf' is not UTF-8"),
        (b'{"prompt": ', "line 3: not JSON"),
        (b"[1]", "line 3: is a JSON list"),
        (b'{"prompt": "\\ud83d"}', r"line 3: `prompt` holds half a surrogate pair"),
        (b'{"id": 99999999999999999999}', "line 3: `id` holds 99999999999999999999, a number of more than 64 bits"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = write(tmp_path / "train.jsonl", TEXT, TEXT)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DatasetError, match=rf"train\.jsonl, {says}"):
        load(path)


def test_lists_byte_order_marks_and_blank_lines(tmp_path):
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf\n" + json.dumps([TEXT, TEXT]).encode())
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\n\n  \n")
    assert (len(load(tmp_path)), load(tmp_path, "test")[0]) == (2, TEXT)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match=r"none\.jsonl: no rows"):
        load(tmp_path / "none.jsonl")


@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_a_file_replaced_with_its_old_time_is_read_again(tmp_path, end):
    path = tmp_path / f"train.{end}"
    for text in ("one", "two"):
        rows = Dataset.from_list([TEXT | {"chosen": text}])
        rows.to_parquet(path) if end == "parquet" else rows.to_json(path)
        os.utime(path, ns=(10**18, 10**18))
        assert load(path)["chosen"][:] == [text]


def packed(path):
    """A row in a file that is packed as its name says."""
    data = json.dumps(TEXT).encode() + b"\n"
    zstd = lambda raw: pa.compress(raw, "zstd", asbytes=True)  # noqa: E731
    ways = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
    path.write_bytes(ways.get(path.suffix.lower(), bytes)(data))


@pytest.mark.parametrize("end", ["jsonl.gz", "json.zst", "JSONL", "jsonl.xz", "json.BZ2"])
def test_packed_files_are_read(tmp_path, end):
    name = f"train.{end}"
    packed(tmp_path / name)
    assert load(tmp_path)[0] == load(tmp_path / name)[0] == TEXT
    assert list(load(tmp_path, streaming=True)) == [TEXT]


def test_a_packed_file_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(TEXT).encode() * 50)[:-9])
    with pytest.raises(DatasetError, match=r"train\.jsonl\.gz cannot be read"):
        load(path)


SHARDS = [
    (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "2 of its 3 shards; .* numbers 1 are missing"),
    (["train_1_of_2.jsonl"], "1 of its 2 shards; .* numbers 0 are missing"),
    (["train-00000-of-00002.jsonl", "train-00001-of-00003.jsonl"], "more than once"),
    (["train-00000-of-00001.jsonl", "train.jsonl"], "more than once"),
    (["train.jsonl", "train.JSONL"], "more than once"),
    (["train.jsonl", "train.jsonl.gz"], "more than once"),
    (["train.jsonl", "data/train-00000-of-00001.jsonl"], "more than once"),
    (["train.jsonl", "train.csv"], r"train\.csv would not be read"),
    (["train.jsonl", "test.jsonl.lz4"], r"test\.jsonl\.lz4 would not be read"),
    (["train.jsonl", "test.parquet.gz"], r"test\.parquet\.gz would not be read"),
]


@pytest.mark.parametrize(("names", "says"), SHARDS, ids=[" ".join(names) for names, _ in SHARDS])
def test_a_folder_that_is_not_whole_or_not_clear_is_refused(tmp_path, names, says):
    (tmp_path / "data").mkdir()
    for name in names:
        packed(tmp_path / name)
    with pytest.raises(DatasetError, match=says):
        local_splits(tmp_path)


FOLDERS = [
    (["settings.json", "summary.json", "rows.jsonl", "rejected.jsonl"], r"generate` wrote it: name .*/rows\.jsonl\."),
    (["settings.json", "rows.jsonl", "results.json"], "evaluate` wrote it: it holds results, and no rows"),
    (["settings.json", "shards/a.jsonl"], "a run that is not finished: give its command again"),
    (["run.json", "adapter_config.json"], "folder of a model or of its training, and holds no rows: name a dataset"),
    (["adapter_config.json"], "holds no rows"),
    (["trainer_state.json"], "holds no rows"),
    (["config.json", "generation_config.json"], "holds no rows"),
    (["test.jsonl"], r"test\.$"),
]


@pytest.mark.parametrize(("names", "says"), FOLDERS, ids=[" ".join(names) for names, _ in FOLDERS])
def test_a_folder_of_a_run_is_called_what_it_is(tmp_path, names, says):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, TEXT)
    with pytest.raises(DatasetError, match=f"has no split 'train'; it has .*{says}"):
        load(tmp_path)


def test_whole_sets_of_shards(tmp_path):
    for name in ("train-1-of-2.jsonl", "train-2-of-2.jsonl", "test-00000-of-00001-0123456789abcdef.jsonl", "a.csv"):
        packed(tmp_path / name)
    assert {split: len(files) for split, files in local_splits(tmp_path).items()} == {"train": 2, "test": 1}


def test_a_saved_dataset_that_lacks_a_file_is_named(tmp_path):
    Dataset.from_list([TEXT]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DatasetError, match=r"saved was written by `save_to_disk` and cannot be read"):
        load(tmp_path / "saved")
