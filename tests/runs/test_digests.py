"""Models and rows are recognised: every byte of a model counts, and the media of a row wherever they lie."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Json, List, concatenate_datasets
from PIL import Image as Picture

from trl_vpo import files
from trl_vpo.data.json_files import load_json
from trl_vpo.files import file_digest
from trl_vpo.runs.digests import model_files, row_digests
from trl_vpo.testbed.rows import write_jsonl


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Files that count as large, and an empty memory of their hashes."""
    monkeypatch.setattr(files, "REMEMBERED", 100)
    monkeypatch.setattr(files, "_memory", lambda: tmp_path / "memory")
    folder = tmp_path / "base"
    folder.mkdir()
    loaded = ("model-1.safetensors", "model-2.safetensors", "config.json", "chat_template.jinja", "modeling_own.py")
    for name in loaded:
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "README.md").write_text("not loaded")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def age(path):
    """As if it had been there for long, which a hash that is remembered must have."""
    seen = time.time
    files.time.time = lambda: seen() + 60
    try:
        return file_digest(path)
    finally:
        files.time.time = seen


def test_every_byte_of_a_model_counts(small):
    before = model_files(small)
    assert len(before) == 5
    data = bytearray((small / "model-2.safetensors").read_bytes())
    stat = (small / "model-2.safetensors").stat()
    data[777] ^= 1
    (small / "model-2.safetensors").write_bytes(data)
    os.utime(small / "model-2.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = model_files(small)
    assert {name for name in before if after[name] != before[name]} == {"model-2.safetensors"}
    moved = shutil.copytree(small, small.with_name("moved"))
    assert model_files(moved) == after


def test_a_large_file_is_read_once_until_it_changes(small, monkeypatch):
    path = small / "model-1.safetensors"
    first = age(path)
    read = []
    monkeypatch.setattr(files.hashlib, "file_digest", lambda file, name: read.append(1))
    assert file_digest(path) == first and not read
    monkeypatch.undo()
    monkeypatch.setattr(files, "REMEMBERED", 100)
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time of the inode's change stays behind
    assert file_digest(path) != first


def test_a_files_hash_in_the_hubs_cache_is_its_name(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert model_files(tmp_path) == {"model.safetensors": "ab" * 32}


def test_the_base_of_an_adapter_counts(small, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(small)}))
    assert "base/model-1.safetensors" in model_files(adapter)
    assert model_files("no/such-model-anywhere") == {}


def test_rows_are_known_by_their_texts_and_media(tmp_path):
    """A file that moved is the same; one with other contents, or other sampling beside it, is not."""
    for folder, extra in (("here", b""), ("there", b""), ("cut", b"more")):
        (tmp_path / folder / "frames").mkdir(parents=True)
        (tmp_path / folder / "clip.mp4").write_bytes(b"clip" * 20_000 + extra)
        for number in range(3):
            (tmp_path / folder / "frames" / f"{number}.png").write_bytes(b"frame" + extra)

    def rows(folder="here", text="yes.", start=0.0, pixels=(0, 0, 0)):
        picture = Picture.new("RGB", (8, 8), pixels)
        features = Features(images=List(Image()))
        pictures = Dataset.from_dict({"images": [[picture], [picture]]}, features=features)
        rows = [
            {"prompt": "a", "videos": [{"path": f"{folder}/clip.mp4", "video_start": start}], "chosen": text},
            {"prompt": "b", "videos": [{"path": f"{folder}/frames", "video_start": None}], "chosen": "no."},
        ]
        dataset = concatenate_datasets([Dataset.from_list(rows), pictures], axis=1)
        return row_digests(dataset, str(tmp_path)).tolist()

    first = rows()
    assert len(set(first)) == 2 and rows("there") == first
    for changed in (rows("cut"), rows(pixels=(1, 0, 0))):
        assert not set(changed) & set(first)
    for changed in (rows(text="Yes."), rows(start=1.0)):
        assert changed[0] != first[0] and changed[1] == first[1]
    (tmp_path / "there" / "frames" / "1.png").write_bytes(b"other")  # as large, and in the middle
    assert rows("there")[0] == first[0] and rows("there")[1] != first[1]
    assert row_digests(Dataset.from_list([{"prompt": "a"}])).dtype == np.uint64


def test_media_in_json_columns_are_known(tmp_path):
    """Paths beside dictionaries. JSON of texts counts as it is stored, and a dataset's own transform does not."""
    (tmp_path / "a.mp4").write_bytes(b"first")
    clip, tools = {"path": "a.mp4", "video_start": 0.0}, [{"name": "f"}, "g"]
    rows = [{"prompt": "a", "tools": tools, "video": "a.mp4"}, {"prompt": "b", "tools": None, "video": clip}]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    data = load_json([tmp_path / "rows.jsonl"])
    assert isinstance(data.features["video"], Json) and isinstance(data.features["tools"], Json)
    first = row_digests(data, str(tmp_path)).tolist()
    plain = [{"prompt": "a", "tools": json.dumps(tools), "video": "a.mp4"}]
    assert row_digests(Dataset.from_list(plain), str(tmp_path)).tolist() == first[:1]
    transformed = data.with_transform(lambda batch: {"prompt": batch["prompt"]})
    assert row_digests(transformed, str(tmp_path)).tolist() == first
    (tmp_path / "a.mp4").write_bytes(b"other")
    assert not set(row_digests(data, str(tmp_path)).tolist()) & set(first)
