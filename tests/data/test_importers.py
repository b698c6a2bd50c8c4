"""Other projects' files to rows: one literal example per format, bad records, files, and loading with `datasets`."""

import json
import re

import pytest

from trl_vpo.data.importers import FORMATS, convert, import_rows
from trl_vpo.errors import ImportFormatError
from trl_vpo.testbed.rows import write_jsonl

TEXT = {"type": "text"}

RRPO = {  # the example of the project's docs/DATA.md, made whole
    "question": "<image>\nThis is a sample question.",
    "answer": "This is a correct or preferred answer.",
    "pred": "This is an incorrect or non-preferred answer.",
    "answer_masked": "This is a <MASK> correct </MASK> or <MASK> preferred </MASK> answer.",
    "pred_masked": "This is an <MASK> incorrect </MASK> or <MASK> non-preferred </MASK> answer.",
    "src": "data-source",
    "sample_id": 0,
    "video": "video.mp4",
}
LPOI = {"img_path": "data/images/1.jpg", "prompt": "What is it?", "chosen": "A dog.", "rejected": "A cat."}
SWIFT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is in the image, <video>What is in the video?"},
        {"role": "assistant", "content": "An elephant and a lion."},
        {"role": "user", "content": "What does the lion do?"},
        {"role": "assistant", "content": "It runs."},
    ],
    "rejected_response": "It sleeps.",
    "images": ["x.jpg"],
    "videos": ["x.mp4"],
}
FACTORY = {
    "conversations": [{"from": "human", "value": "<image>\n<image>\nWhich is red?"}],
    "chosen": {"from": "gpt", "value": "The first."},
    "rejected": {"from": "gpt", "value": "The second."},
    "images": ["a.jpg", "b.jpg"],
}
HOUND = {
    "id": "v_1",
    "video": "webvid/123",
    "prompt": "What happens?\n<video>",
    "answer": "The ground truth.",
    "chosen": "A dog runs.",
    "rejected": "A cat runs.",
    "chosen_score": 5,
    "rejected_score": 2,
}
RECORDS = {"rrpo": RRPO, "lpoi": LPOI, "ms-swift": SWIFT, "llamafactory": FACTORY, "llava-hound": HOUND}


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def one(tmp_path, fmt, record, **options):
    (row,) = import_rows(fmt, write(tmp_path / "in.jsonl", record), **options)
    return row


def user(*parts):
    return {"role": "user", "content": [{"type": p} if p in ("image", "video") else TEXT | {"text": p} for p in parts]}


def said(text, role="assistant"):
    return {"role": role, "content": [TEXT | {"text": text}]}


def contents(tmp_path, text, **media):
    """The contents that a LLaMA-Factory record's user turn becomes."""
    record = FACTORY | {"conversations": [{"from": "human", "value": text}], "images": None} | media
    return one(tmp_path, "llamafactory", record)["prompt"]


# --- formats ----------------------------------------------------------------------------------------------------


def test_every_format_has_an_example():
    assert set(RECORDS) == set(FORMATS)


def test_rrpo(tmp_path):
    row = one(tmp_path, "rrpo", RRPO)
    assert row == {
        "id": "0",
        "source": "rrpo/data-source",
        "prompt": [user("video", "This is a sample question.")],
        "chosen": [said(RRPO["answer"])],
        "rejected": [said(RRPO["pred"])],
        "videos": ["video.mp4"],
        "chosen_phrases": [[10, 17], [21, 30]],
        "rejected_phrases": [[11, 20], [24, 37]],
    }
    assert [RRPO["answer"][a:b] for a, b in row["chosen_phrases"]] == ["correct", "preferred"]
    assert [RRPO["pred"][a:b] for a, b in row["rejected_phrases"]] == ["incorrect", "non-preferred"]


def test_rrpo_as_its_own_loader_reads_it(tmp_path):
    record = {k: v for k, v in RRPO.items() if k != "video"} | {"media_path": "clips/1.mp4"}
    assert one(tmp_path, "rrpo", record)["videos"] == ["clips/1.mp4"]


def test_rrpo_without_tags_is_left_to_the_word_diff(tmp_path):
    for masked in ({}, {"answer_masked": RRPO["answer"], "pred_masked": RRPO["pred"]}):
        record = {k: v for k, v in RRPO.items() if "masked" not in k} | masked
        row = one(tmp_path, "rrpo", record)
        assert row["chosen_phrases"] is None and row["rejected_phrases"] is None


def test_rrpo_words_only_added(tmp_path):
    texts = {
        "answer": "A car.",
        "pred": "A red car.",
        "answer_masked": "A car.",
        "pred_masked": "A <MASK> red </MASK> car.",
    }
    row = one(tmp_path, "rrpo", RRPO | texts)
    assert (row["chosen_phrases"], row["rejected_phrases"]) == ([], [[2, 5]])


def test_lpoi(tmp_path):
    row = one(tmp_path, "lpoi", LPOI)
    assert row["prompt"] == [user("image", "What is it?")]
    assert (row["images"], row["id"], row["source"]) == (["data/images/1.jpg"], "in-1", "lpoi")
    assert "videos" not in row


def test_ms_swift(tmp_path):
    assert one(tmp_path, "ms-swift", SWIFT) == {
        "id": "in-1",
        "source": "ms-swift",
        "prompt": [
            said("Be brief.", "system"),
            user("image", "What is in the image, ", "video", "What is in the video?"),
            said("An elephant and a lion."),
            user("What does the lion do?"),
        ],
        "chosen": [said("It runs.")],
        "rejected": [said("It sleeps.")],
        "images": ["x.jpg"],
        "videos": ["x.mp4"],
    }


def test_ms_swift_rejected_messages(tmp_path):
    record = {k: v for k, v in SWIFT.items() if k != "rejected_response"} | {"rejected_images": ["x.jpg"]}
    rejected = [*SWIFT["messages"][:-1], {"role": "assistant", "content": "It sleeps."}]
    assert one(tmp_path, "ms-swift", record | {"rejected_messages": rejected}) == one(tmp_path, "ms-swift", SWIFT)


def test_llamafactory(tmp_path):
    row = one(tmp_path, "llamafactory", FACTORY | {"system": "Be brief."})
    assert row["prompt"] == [said("Be brief.", "system"), user("image", "image", "Which is red?")]
    assert (row["chosen"], row["rejected"]) == ([said("The first.")], [said("The second.")])
    assert (row["images"], row["videos"]) == (["a.jpg", "b.jpg"], [])
    openai = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "<image>\n<image>\nWhich is red?"},
        ],
        "chosen": {"role": "assistant", "content": "The first."},
        "rejected": "The second.",
        "images": ["a.jpg", {"path": "b.jpg", "bytes": None}],
    }
    assert one(tmp_path, "llamafactory", openai) == one(tmp_path, "llamafactory", FACTORY)


def test_llava_hound(tmp_path):
    row = one(tmp_path, "llava-hound", HOUND)
    assert row["prompt"] == [user("What happens?", "video")]
    assert (row["id"], row["videos"], row["chosen"]) == ("v_1", ["webvid/123"], [said("A dog runs.")])


def test_markers_become_placeholders(tmp_path):
    two = {"images": ["a", "b"]}
    assert contents(tmp_path, "Which?", **two) == [user("image", "image", "Which?")]
    assert contents(tmp_path, "Is <image> like <image>?", **two) == [user("Is ", "image", " like ", "image", "?")]
    assert contents(tmp_path, " Say it \n<image>", images="a") == [user(" Say it", "image")]
    assert contents(tmp_path, "<image>", images="a") == [user("image")]
    assert contents(tmp_path, "<video>\nsee <image>\n", images=["a"], videos=["b"]) == [user("video", "see", "image")]
    assert contents(tmp_path, "no media") == [user("no media")]


def test_media_root(tmp_path):
    def images(root, *paths):
        return one(tmp_path, "llamafactory", FACTORY | {"images": list(paths)}, media_root=root)["images"]

    assert images("/data", "a.jpg", "/abs/b.jpg") == ["/data/a.jpg", "/abs/b.jpg"]
    assert images(tmp_path, "a.jpg", "https://host/b.jpg") == [str(tmp_path / "a.jpg"), "https://host/b.jpg"]
    assert images(None, "a.jpg", "b.jpg") == ["a.jpg", "b.jpg"]


# --- bad records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt, change, message",
    [
        ("rrpo", {"answer": None}, r"line 1: `answer` is missing. The record has the fields question, answer"),
        ("rrpo", {"pred": " "}, "`pred` is empty"),
        ("rrpo", {"video": None}, r"`video` \(or `media_path`\) is missing"),
        ("rrpo", {"video": 3}, "`video` is int, not text"),
        (
            "rrpo",
            {"answer_masked": "This is <MASK> right </MASK>."},
            "`answer_masked`: the tagged text is not the plain",
        ),
        ("rrpo", {"pred_masked": "an <MASK> incorrect"}, "`pred_masked`: the last <MASK> .* never closed"),
        ("rrpo", {"pred_masked": None}, "`pred_masked`: `pred_masked` is missing"),
        ("rrpo", {"pred": RRPO["answer"]}, "identical"),
        ("rrpo", {"question": "<image><image> two?"}, r"2 <video> marker\(s\) for 1 videos"),
        (
            "rrpo",
            {"answer": "half a pair \ud83d", "answer_masked": None, "pred_masked": None},
            "surrogates not allowed",
        ),
        ("lpoi", {"img_path": ""}, "`img_path` is empty"),
        ("lpoi", {"prompt": "<video> What?"}, r"0 <image> marker\(s\) for 1 images"),
        ("lpoi", {"chosen": "see <image>"}, "the chosen response contains <image>"),
        ("ms-swift", {"messages": []}, "`messages` is missing or not a list"),
        ("ms-swift", {"messages": SWIFT["messages"][:-1]}, "`messages` ends with the user's turn"),
        ("ms-swift", {"messages": SWIFT["messages"][-1:]}, "the prompt does not end with the user's turn"),
        ("ms-swift", {"messages": [{"role": "tool", "content": "x"}]}, r"`messages`\[0\] has the role 'tool'. Roles:"),
        ("ms-swift", {"messages": ["hello"]}, r"`messages`\[0\] is not a message"),
        ("ms-swift", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"`messages`\[0\] has no text"),
        ("ms-swift", {"rejected_response": None}, "`rejected_response` .*is missing"),
        ("ms-swift", {"rejected_images": ["y.jpg"]}, "`rejected_images` differ from `images`"),
        ("ms-swift", {"rejected_response": None, "rejected_messages": SWIFT["messages"][3:]}, "another prompt"),
        ("ms-swift", {"images": []}, r"1 <image> marker\(s\) for 0 images"),
        ("ms-swift", {"videos": [["1.jpg", "2.jpg"]]}, r"`videos`\[0\] is not a path"),
        ("ms-swift", {"images": [{"bytes": "aGk="}]}, r"`images`\[0\] is not a path"),
        ("ms-swift", {"images": 3}, "`images` is int, not a list"),
        ("ms-swift", {"audios": ["a.wav"]}, "`audios` is not supported"),
        (
            "llamafactory",
            {"conversations": [{"from": "gpt", "value": "<image>"}, *FACTORY["conversations"]]},
            "not the user's. Move",
        ),
        ("llamafactory", {"chosen": {"from": "gpt"}}, "`chosen` has no text"),
        ("llava-hound", {"rejected": "A dog runs. "}, "identical"),
    ],
)
def test_bad_records(tmp_path, fmt, change, message):
    path = write_jsonl([RECORDS[fmt] | change], tmp_path / "in.jsonl")
    with pytest.raises(ImportFormatError, match=message) as error:
        list(import_rows(fmt, path))
    assert str(error.value).startswith(f"{path}, line 1: ")
    # the same record is skipped, counted and listed with its reason on request
    good = RECORDS[fmt] | {"id": "good"}
    counts = convert(fmt, write_jsonl([RECORDS[fmt] | change, good], path), tmp_path / "out.jsonl", on_bad="skip")
    assert (counts.read, counts.written, counts.rejected) == (2, 1, 1)
    (listed,) = map(json.loads, (tmp_path / "out.jsonl.rejected.jsonl").read_text().splitlines())
    assert re.search(message, listed["reason"]) and listed["record"] == RECORDS[fmt] | change


# --- files ------------------------------------------------------------------------------------------------------


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
        ("lpoi", "in.jsonl", "[{}, ", "begins as a JSON list but is not one"),
    ],
)
def test_unreadable_input(tmp_path, fmt, name, text, message):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ImportFormatError, match=message):
        list(import_rows(fmt, tmp_path / name))


def test_convert_counts(tmp_path):
    (tmp_path / "webvid/123").mkdir(parents=True)  # LLaVA-Hound ships folders of frames
    records = [HOUND, HOUND | {"id": "v_2", "chosen": "红色的车 🚗"}, HOUND | {"id": "v_3", "video": "webvid/missing"}]
    counts = convert(
        "llava-hound", write(tmp_path / "in.jsonl", *records), tmp_path / "new/out.jsonl", media_root=tmp_path
    )
    assert (counts.read, counts.written, counts.rejected, counts.rejected_path) == (3, 3, 0, None)
    assert (counts.media, counts.missing_media) == (2, 1)
    assert counts.ignored_fields == ["answer", "chosen_score", "rejected_score"]
    text = (tmp_path / "new/out.jsonl").read_text(encoding="utf-8")
    assert "红色的车 🚗" in text
    assert [json.loads(line)["id"] for line in text.splitlines()] == ["v_1", "v_2", "v_3"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.jsonl"]


def test_file_urls_are_looked_up(tmp_path):
    (tmp_path / "a b.jpg").touch()
    url = (tmp_path / "a b.jpg").as_uri()
    records = [LPOI | {"img_path": path} for path in (url, url + "x", "https://host/c.jpg")]
    counts = convert("lpoi", write(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl")
    assert (counts.media, counts.missing_media) == (3, 1)


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
    assert json.loads(out.read_text())["chosen"] == [said("A dog.")]
    with pytest.raises(ImportFormatError, match="same file"):
        convert("lpoi", source, source)
    with pytest.raises(ValueError, match="must be 'error' or 'skip'"):
        convert("lpoi", source, out, on_bad="drop")


# --- loading ----------------------------------------------------------------------------------------------------


def load(path, tmp_path, **options):
    import datasets

    cache = str(tmp_path / "cache")
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache, **options)


@pytest.mark.parametrize("fmt", RECORDS)
def test_rows_load_and_keep_the_contract(tmp_path, fmt):
    from trl_vpo.data.rows import read_row

    out = tmp_path / "out.jsonl"
    convert(fmt, write(tmp_path / "in.jsonl", RECORDS[fmt], RECORDS[fmt]), out)
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


def test_columns_that_no_row_fills_are_left_out(tmp_path):
    convert("llamafactory", write(tmp_path / "in.jsonl", FACTORY), tmp_path / "out.jsonl")
    assert set(json.loads((tmp_path / "out.jsonl").read_text())) == {
        "id",
        "source",
        "prompt",
        "chosen",
        "rejected",
        "images",
    }
