"""Importing files: read once per record, written whole, with counts; and loaded with `datasets`."""

import gzip
import json

import pytest
from datasets import load_dataset
from import_records import FACTORY, HOUND, LPOI, PAIRS, RLHF_V, import_rows

from trl_vpo.data.importers import convert
from trl_vpo.data.rows import read_row
from trl_vpo.errors import ImportFormatError


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_list_and_lines_are_told_apart_by_content(tmp_path):
    lines = write(tmp_path / "a.json", LPOI, LPOI | {"id": 7})
    blank = tmp_path / "b.jsonl"
    blank.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes().replace(b"\n", b"\r\n\n"))
    items = tmp_path / "c.jsonl"
    items.write_text("\n " + json.dumps([LPOI, LPOI | {"id": 7}], indent=1))
    ids = [[row["id"] for row in import_rows("lpoi", path)] for path in (lines, blank, items)]
    assert ids == [["a-1", "7"], ["b-1", "7"], ["c-1", "7"]]


def test_lines_are_streamed(tmp_path):
    rows = import_rows("lpoi", write(tmp_path / "in.jsonl", LPOI, {"broken": 1}))
    assert next(rows)["id"] == "in-1"  # the bad second line has not been looked at
    with pytest.raises(ImportFormatError, match="line 2: `img_path` is missing"):
        next(rows)


def test_on_reject_goes_on(tmp_path):
    path = write(tmp_path / "in.jsonl", LPOI, {"broken": 1}, [1], LPOI)
    with path.open("ab") as file:
        file.write(b'{"img_path": \n{"prompt": "\xff"}\n')
    errors = []
    assert [row["id"] for row in import_rows("lpoi", path, on_reject=errors.append)] == ["in-1", "in-4"]
    starts = [str(error).removeprefix(f"{path}, ")[:22] for error in errors]
    assert starts == [
        "line 2: `img_path` is ",
        "line 3: is a JSON list",
        "line 5: not JSON (Expe",
        "line 6: byte 0xff behi",
    ]


@pytest.mark.parametrize(
    "fmt, name, text, message",
    [
        ("rlhf", "in.jsonl", "{}", "unknown format 'rlhf'. Formats: rrpo, lpoi, ms-swift, llamafactory, llava-hound"),
        ("lpoi", "other.jsonl", "{}", "no such file"),
        ("lpoi", "in.jsonl", "[{}, ", "cannot be read as JSON"),
        ("pope", "in.jsonl", '{"label": "yes", "label": "no"}', "line 1: .*'label' twice, for 'yes' and 'no'. Leave"),
        ("pope", "in.jsonl", '[{"label": "yes", "label": "no"}]', "an object has the key 'label' twice"),
        ("vidhalluc", "in.jsonl", '{"7": [1], "7": [2]}', "in.jsonl cannot be read as JSON.*'7' twice"),
        ("vidhalluc", "in.jsonl", '{"7": ', "in.jsonl cannot be read as JSON.*line 1 column 7"),
    ],
)
def test_unreadable_input(tmp_path, fmt, name, text, message):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ImportFormatError, match=message):
        list(import_rows(fmt, tmp_path / name))


@pytest.mark.parametrize(
    "fmt, content, message",
    [
        ("lpoi", b"PK\3\4", "line 1: it begins as an archive"),
        ("vidhalluc", b"PK\3\4", "it begins as an archive .zip or gzip.. Unpack it"),
        ("lpoi", gzip.compress(b"[]"), "line 1: it begins as an archive"),
        ("lpoi", '{"id": "é"}\n'.encode("utf-16"), "line 1: it is written in utf-16, .* `iconv -f utf-16 -t utf-8`"),
        ("vidhalluc", '{"id": 1}'.encode("utf-16-le"), "it is written in utf-16le, .* `iconv -f utf-16le -t"),
    ],
)
def test_other_files_are_not_said_to_be_latin_1(tmp_path, fmt, content, message):
    (tmp_path / "in.json").write_bytes(content + b"\xff")
    with pytest.raises(ImportFormatError, match=message):
        list(import_rows(fmt, tmp_path / "in.json"))


@pytest.mark.parametrize("fmt", ["lpoi", "vidhalluc", "mmpr"])
def test_damaged_compressed_files(tmp_path, fmt):
    path = tmp_path / "meta.json.gz"
    path.write_bytes(gzip.compress(b"{}")[:10] + b"\xff" * 20)
    with pytest.raises(ImportFormatError, match=r"meta\.json\.gz cannot be read"):
        list(import_rows(fmt, path))


def test_convert_counts(tmp_path):
    (tmp_path / "webvid/123").mkdir(parents=True)  # LLaVA-Hound ships folders of frames
    records = [HOUND, HOUND | {"id": "v_2", "chosen": "红色的车 🚗"}, HOUND | {"id": "v_3", "video": "webvid/missing"}]
    source = write(tmp_path / "in.jsonl", *records)
    counts = convert("llava-hound", source, tmp_path / "new/out.jsonl", media_root=tmp_path)
    assert (counts.read, counts.written, counts.rejected, counts.rejected_path) == (3, 3, 0, None)
    assert (len(counts.media), len(counts.missing_media)) == (2, 1)
    assert counts.ignored_fields == ["answer", "chosen_score", "rejected_score"]
    text = (tmp_path / "new/out.jsonl").read_text(encoding="utf-8")
    assert "红色的车 🚗" in text
    assert [json.loads(line)["id"] for line in text.splitlines()] == ["v_1", "v_2", "v_3"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.jsonl"]
    counts = convert("rlaif-v", write(source, RLHF_V), tmp_path / "out.jsonl")
    assert counts.ignored_fields == ["ds_name", "origin_split"]  # the texts came from `text`


def test_file_urls_are_looked_up(tmp_path):
    (tmp_path / "a b.jpg").touch()
    url = (tmp_path / "a b.jpg").as_uri()
    records = [LPOI | {"img_path": path} for path in (url, url + "x", "https://host/c.jpg")]
    counts = convert("lpoi", write(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl")
    assert (len(counts.media), counts.missing_media) == (3, [url + "x", "https://host/c.jpg"])
    missing, urls, _ = counts.left_to_do
    assert missing.startswith(f"Missing media, for example {url}x. Relative paths start here: --media_root FOLDER")
    assert urls.startswith("URLs, for example https://host/c.jpg: nothing is fetched here, download them")


def test_convert_writes_all_or_nothing(tmp_path):
    out, rejected = tmp_path / "out.jsonl", tmp_path / "out.jsonl.rejected.jsonl"
    out.write_text("before")
    source = write(tmp_path / "in.jsonl", LPOI, {"broken": 1})
    with pytest.raises(ImportFormatError, match="line 2"):
        convert("lpoi", source, out)
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert convert("lpoi", source, out, on_bad="skip").rejected_path == str(rejected)
    convert("lpoi", write(source, LPOI), out)
    assert not rejected.exists()  # it would tell of another run
    with pytest.raises(ImportFormatError, match=r"none of its 1 records .*rejected\.jsonl says why"):
        convert("lpoi", write(source, {"broken": 1}), out, on_bad="skip")
    with pytest.raises(ImportFormatError, match="none of its 0 records"):
        convert("lpoi", write(source), out)
    assert json.loads(out.read_text())["chosen"] == [
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    ]
    with pytest.raises(ValueError, match="must be 'error' or 'skip'"):
        convert("lpoi", source, out, on_bad="drop")


@pytest.mark.parametrize("name, out", [("in.jsonl", "in.jsonl"), ("x.jsonl.rejected.jsonl", "x.jsonl")])
def test_an_output_is_no_input(tmp_path, name, out):
    source = write(tmp_path / name, LPOI)
    with pytest.raises(ImportFormatError, match=f"{name}: input and output are the same file"):
        convert("lpoi", source, tmp_path / out)
    assert json.loads(source.read_text()) == LPOI


def load(path, tmp_path, **options):
    cache = str(tmp_path / "cache")
    return load_dataset("json", data_files=str(path), split="train", cache_dir=cache, **options)


@pytest.mark.parametrize("fmt", PAIRS)
def test_rows_load_and_keep_the_contract(tmp_path, fmt):
    out = tmp_path / "out.jsonl"
    convert(fmt, write(tmp_path / "in.jsonl", PAIRS[fmt], PAIRS[fmt]), out)
    dataset = load(out, tmp_path)
    (original, _) = map(json.loads, out.read_text().splitlines())
    assert set(dataset.column_names) == set(original)
    row = read_row(dataset[0], phrases=fmt == "rrpo")
    assert row.prompt == original["prompt"]  # Arrow's None keys are gone
    assert (row.images, row.videos) == (original.get("images", []), original.get("videos", []))
    if fmt == "rrpo":
        assert row.chosen_phrases == [(10, 17), (21, 30)]


def test_mixed_media_load_in_small_chunks(tmp_path):
    """Images first and videos far behind: the types of both columns must be known from the first chunk."""
    images = [FACTORY | {"id": f"i{n}"} for n in range(60)]
    videos = [FACTORY | {"id": f"v{n}", "images": [], "videos": ["a.mp4", "b.mp4"]} for n in range(60)]
    for record in videos:
        record["conversations"] = [{"from": "human", "value": "<video><video>Which is red?"}]
    texts = [{"id": "t", "conversations": [{"from": "human", "value": "Hi"}], "chosen": "Hello.", "rejected": "No."}]
    out = tmp_path / "out.jsonl"
    convert("llamafactory", write(tmp_path / "in.jsonl", *texts, *images, *videos), out)
    dataset = load(out, tmp_path, chunksize=4000)
    assert len(dataset) == 121
    assert sorted(dataset["id"]) == sorted(r["id"] for r in texts + images + videos)
    assert list(dataset["id"][:4]) == ["i0", "v0", "t", "i1"]
    assert (dataset[1]["images"], dataset[1]["videos"]) == ([], ["a.mp4", "b.mp4"])


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.json", "out.jsonl.gz", "out", ".jsonl"])
def test_outputs_are_json_lines(tmp_path, name):
    with pytest.raises(ImportFormatError, match="the output is JSON lines"):
        convert("lpoi", write(tmp_path / "in.jsonl", LPOI), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_output_that_cannot_be_written(tmp_path):
    source = write(tmp_path / "in.jsonl", LPOI)
    with pytest.raises(ImportFormatError, match=r"in\.jsonl/out\.jsonl cannot be written \(.*\)\. Free space"):
        convert("lpoi", source, source / "out.jsonl")


def test_columns_that_no_row_fills_are_left_out(tmp_path):
    convert("llamafactory", write(tmp_path / "in.jsonl", FACTORY), tmp_path / "out.jsonl")
    columns = {"id", "source", "prompt", "chosen", "rejected", "images"}
    assert set(json.loads((tmp_path / "out.jsonl").read_text())) == columns
