"""Other projects' records to rows: one literal example per format, and bad records."""

import json
import math
import re

import pytest
from datasets import load_dataset
from import_records import (
    ALPACA,
    ELV_HALLUC_DPO,
    FACTORY,
    HOUND,
    LPOI,
    MMPR,
    RECORDS,
    RLAIF_V,
    RLHF_V,
    RRPO,
    SWIFT,
    SYMMPO,
    VIDEOCHAT2,
    import_rows,
)

from trl_vpo.data.importers import FORMATS, convert
from trl_vpo.data.rows import read_row
from trl_vpo.errors import ImportFormatError
from trl_vpo.testbed.rows import write_jsonl

TEXT = {"type": "text"}


def one(tmp_path, fmt, record, **options):
    (row,) = import_rows(fmt, write_jsonl([record], tmp_path / "in.jsonl"), **options)
    return row


def user(*parts):
    return {"role": "user", "content": [{"type": p} if p in ("image", "video") else TEXT | {"text": p} for p in parts]}


def says(text, role="assistant"):
    return {"role": role, "content": [TEXT | {"text": text}]}


def contents(tmp_path, text, **media):
    """The contents that a LLaMA-Factory record's user turn becomes."""
    record = FACTORY | {"conversations": [{"from": "human", "value": text}], "images": None} | media
    return one(tmp_path, "llamafactory", record)["prompt"]


def test_rrpo(tmp_path):
    assert set(RECORDS) == {name for name, fmt in FORMATS.items() if fmt.makes != "held-out rows"}
    row = one(tmp_path, "rrpo", RRPO)
    assert row == {
        "id": "0",
        "source": "rrpo/data-source",
        "prompt": [user("video", "This is a sample question.")],
        "chosen": [says(RRPO["answer"])],
        "rejected": [says(RRPO["pred"])],
        "videos": ["video.mp4"],
        "chosen_phrases": [[10, 17], [21, 30]],
        "rejected_phrases": [[11, 20], [24, 37]],
    }
    assert [RRPO["answer"][a:b] for a, b in row["chosen_phrases"]] == ["correct", "preferred"]
    assert [RRPO["pred"][a:b] for a, b in row["rejected_phrases"]] == ["incorrect", "non-preferred"]
    as_its_own_loader_reads = {k: v for k, v in RRPO.items() if k != "video"} | {"media_path": "clips/1.mp4"}
    assert one(tmp_path, "rrpo", as_its_own_loader_reads)["videos"] == ["clips/1.mp4"]


def test_rrpo_without_tags_is_left_to_the_word_diff(tmp_path):
    for masked in ({"answer_masked": None, "pred_masked": None}, {s + "_masked": RRPO[s] for s in ("answer", "pred")}):
        row = one(tmp_path, "rrpo", RRPO | masked)
        assert row["chosen_phrases"] is None and row["rejected_phrases"] is None


def test_rrpo_words_only_added(tmp_path):
    texts = {"answer": "A car.", "answer_masked": "A car.", "pred": "A red car."}
    row = one(tmp_path, "rrpo", RRPO | texts | {"pred_masked": "A <MASK> red </MASK> car."})
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
            says("Be brief.", "system"),
            user("image", "What is in the image, ", "video", "What is in the video?"),
            says("An elephant and a lion."),
            user("What does the lion do?"),
        ],
        "chosen": [says("It runs.")],
        "rejected": [says("It sleeps.")],
        "images": ["x.jpg"],
        "videos": ["x.mp4"],
    }
    record = {k: v for k, v in SWIFT.items() if k != "rejected_response"} | {"rejected_images": ["x.jpg"]}
    rejected = [*SWIFT["messages"][:-1], {"role": "assistant", "content": "It sleeps."}]
    assert one(tmp_path, "ms-swift", record | {"rejected_messages": rejected}) == one(tmp_path, "ms-swift", SWIFT)
    assert one(tmp_path, "ms-swift", SWIFT | {"rejected_messages": rejected}) == one(tmp_path, "ms-swift", SWIFT)
    assert one(tmp_path, "ms-swift", SWIFT | {"rejected_messages": []}) == one(tmp_path, "ms-swift", SWIFT)


def test_ms_swift_rejected_media(tmp_path):
    """What is not given is the chosen side's; a missing response stays missing."""
    row = one(tmp_path, "ms-swift", SWIFT | {"rejected_images": ["y.jpg"], "rejected_response": None})
    assert row["rejected_images"] == ["y.jpg"] and not row.keys() & {"rejected", "rejected_videos"}
    read = read_row(row, media_form="pair")
    assert read.media_list == [(["x.jpg"], ["x.mp4"]), (["y.jpg"], ["x.mp4"])] and read.rejected == read.chosen
    videos = {"rejected_videos": ["y.mp4"], "rejected_images": ["x.jpg"]}
    row = one(tmp_path, "ms-swift", SWIFT | videos)
    assert row["rejected"] == [says("It sleeps.")] and row["rejected_videos"] == ["y.mp4"]
    plain, contrast = SWIFT, {k: v for k, v in SWIFT.items() if k != "rejected_response"} | videos
    counts = convert("ms-swift", write_jsonl([plain, contrast], tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert (counts.written, len(counts.media)) == (2, 3)
    files = {"data_files": str(tmp_path / "out.jsonl"), "cache_dir": str(tmp_path / "cache")}
    first, second = sorted(load_dataset("json", split="train", **files), key=lambda row: row["id"])
    assert (first["rejected_videos"], second["rejected"]) == (None, None)


def test_symmpo(tmp_path):
    row = one(tmp_path, "symmpo", SYMMPO)
    read = read_row(row, media_form="symmetric")
    assert read.media_list == [(["1.jpg"], []), (["2.jpg"], [])] and row["prompt"] == [user("image", "What is it?")]
    assert [row[side] for side in read.sides] == [[says(t)] for t in ("A dog.", "A cat.", "A fox.")]
    counts = convert("symmpo", write_jsonl([SYMMPO], tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert counts.ignored_fields == ["resp_2_l"]


def test_llamafactory(tmp_path):
    row = one(tmp_path, "llamafactory", FACTORY | {"system": "Be brief."})
    assert row["prompt"] == [says("Be brief.", "system"), user("image", "image", "Which is red?")]
    assert (row["chosen"], row["rejected"]) == ([says("The first.")], [says("The second.")])
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


def test_llamafactory_alpaca(tmp_path):
    row = one(tmp_path, "llamafactory", ALPACA)
    turns = [says("Be brief.", "system"), user("Look."), says("I look.")]
    assert row["prompt"] == [*turns, user("image", "Which is red?\nName the one.")]
    assert (row["chosen"], row["rejected"], row["images"]) == ([says("The first.")], [says("The second.")], ["a.jpg"])
    bare = {name: ALPACA[name] for name in ("instruction", "chosen", "rejected")} | {"input": "", "history": None}
    assert one(tmp_path, "llamafactory", bare | {"instruction": "Hi"})["prompt"] == [user("Hi")]


def test_videochat2(tmp_path):
    row = one(tmp_path, "videochat2", VIDEOCHAT2)
    assert row == {
        "id": "12",
        "source": "videochat2",
        "prompt": [user("video", "Watch the video.\nWhat moves?")],
        "chosen": [says("A red square.")],
        "rejected": [says("A blue square.")],
        "videos": ["k710/1.mp4"],
    }
    part = {"path": "/data/k710/1.mp4", "video_start": 1.5, "video_end": 4}
    row = one(tmp_path, "videochat2", VIDEOCHAT2 | {"start": 1.5, "end": 4}, media_root="/data")
    assert row["videos"] == [part]


def test_videochat2_pairs_the_answers_that_differ(tmp_path):
    asked = [{"i": "", "q": q} for q in ("One?", "Two?", "Three?")]
    sides = [[q | {"a": a} for q, a in zip(asked, answers)] for answers in (["1", "2", "3"], ["one", "2 ", "three"])]
    path = write_jsonl([VIDEOCHAT2 | {"QA": sides[0], "QA_NEG": sides[1]}], tmp_path / "in.jsonl")
    rows = [(row["id"], row["prompt"][0], row["rejected"]) for row in import_rows("videochat2", path)]
    expected = [("12-1", user("video", "One?"), [says("one")]), ("12-2", user("video", "Three?"), [says("three")])]
    assert rows == expected


def test_rlhf_v_and_rlaif_v(tmp_path):
    row = one(tmp_path, "rlhf-v", RLHF_V)
    assert row == {
        "id": "3",
        "source": "rlhf-v/LLaVA-Instruct",
        "prompt": [user("image", "What is it?")],
        "chosen": [says("A dog.")],
        "rejected": [says("A cat.")],
        "images": ["1.jpg"],
    }
    assert one(tmp_path, "rlaif-v", RLAIF_V) == row | {"id": "4", "source": "rlaif-v/COCO"}
    without = {name: value for name, value in RLAIF_V.items() if name != "image"}
    assert one(tmp_path, "rlaif-v", without)["images"] == ["images/1.jpg"]


def test_elv_halluc_dpo_has_other_names(tmp_path):
    row = one(tmp_path, "elv-halluc-dpo", ELV_HALLUC_DPO)
    named = {"video": "videos", "prompt": "question", "rejected": "rejected_response"}
    other = {named.get(name, name): value for name, value in ELV_HALLUC_DPO.items()}
    assert one(tmp_path, "elv-halluc-dpo", other) == row and row["videos"] == ["videos/1.mp4"]


def test_mmpr(tmp_path):
    row = one(tmp_path, "mmpr", MMPR, media_root="/data/ScienceQA")
    assert row["prompt"] == [user("image", "What is it?")] and row["images"] == ["/data/ScienceQA/1.png"]
    assert row["id"] == "in-1"  # many pairs share the `id` of their question
    two = MMPR | {"image": ["1.png", "2.png"], "question": "Is <image> like <image>?"}
    assert one(tmp_path, "mmpr", two)["prompt"] == [user("Is ", "image", " like ", "image", "?")]
    words = one(tmp_path, "mmpr", MMPR | {"image": "", "question": "1 + 1?"})
    assert (words["prompt"], words["images"]) == ([user("1 + 1?")], [])


def test_llava_hound(tmp_path):
    row = one(tmp_path, "llava-hound", HOUND)
    assert row["prompt"] == [user("What happens?", "video")]
    assert (row["id"], row["videos"], row["chosen"]) == ("v_1", ["webvid/123"], [says("A dog runs.")])


def test_markers_become_placeholders(tmp_path):
    two = {"images": ["a", "b"]}
    assert contents(tmp_path, "Which?", **two) == [user("image", "image", "Which?")]
    assert contents(tmp_path, "Is <image> like <image>?", **two) == [user("Is ", "image", " like ", "image", "?")]
    assert contents(tmp_path, " Say it \n<image>", images="a") == [user(" Say it ", "image")]
    assert contents(tmp_path, "<image>", images="a") == [user("image")]
    assert contents(tmp_path, "<video>\nsee <image>\n", images=["a"], videos=["b"]) == [user("video", "see ", "image")]
    assert contents(tmp_path, "no media") == [user("no media")]


def test_media_root(tmp_path):
    def images(root, *paths):
        return one(tmp_path, "llamafactory", FACTORY | {"images": list(paths)}, media_root=root)["images"]

    assert images("/data", "a.jpg", "/abs/b.jpg") == ["/data/a.jpg", "/abs/b.jpg"]
    assert images(tmp_path, "a.jpg", "https://host/b.jpg") == [str(tmp_path / "a.jpg"), "https://host/b.jpg"]
    assert images(None, "a.jpg", "b.jpg") == ["a.jpg", "b.jpg"]


IMAGE_OF_GPT = {"from": "gpt", "value": "<image>"}


@pytest.mark.parametrize(
    "fmt, change, message",
    [
        ("rrpo", {"answer": None}, r"line 1: `answer` is missing. The record has the fields question, answer"),
        ("rrpo", {"pred": " "}, "`pred` is empty"),
        ("rrpo", {"video": None}, r"`video` \(or `media_path`\) is missing"),
        ("rrpo", {"video": 3}, "`video` is int; write it as text"),
        ("rrpo", {"answer_masked": "a <MASK> right </MASK>."}, "`answer_masked`: the tagged text is not the plain"),
        ("rrpo", {"pred_masked": "an <MASK> incorrect"}, "`pred_masked`: the last <MASK> .* never closed"),
        ("rrpo", {"pred_masked": None}, "`pred_masked`: `pred_masked` is missing"),
        ("rrpo", {"pred": RRPO["answer"]}, "identical"),
        ("rrpo", {"question": "<image><image> two?"}, r"2 video placeholder\(s\), but the row has 1"),
        ("rrpo", {"answer": "\ud83d", "answer_masked": None, "pred_masked": None}, r"half a surrogate pair .\\ud83d"),
        ("lpoi", {"img_path": ""}, "`img_path` is empty"),
        ("lpoi", {"prompt": "<video> What?"}, r"0 image placeholder\(s\), but the row has 1"),
        ("lpoi", {"chosen": "see <image>"}, r"stands in a text that is not the user's .chosen"),
        ("ms-swift", {"messages": []}, "`messages` is missing or not a list"),
        ("ms-swift", {"messages": SWIFT["messages"][:-1]}, "`messages` ends with the user's turn"),
        ("ms-swift", {"messages": SWIFT["messages"][-1:]}, "the prompt does not end with the user's turn"),
        ("ms-swift", {"messages": [{"role": "tool", "content": "x"}]}, r"`messages`\[0\] has the role 'tool'. Roles:"),
        ("ms-swift", {"messages": ["hello"]}, r"`messages`\[0\] is not a message"),
        ("ms-swift", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"`messages`\[0\] has no text"),
        ("ms-swift", {"rejected_response": None}, "`rejected_response` .*is missing"),
        ("ms-swift", {"rejected_images": ["y.jpg", "z.jpg"]}, "`rejected_images` has 2 items, and `images` 1"),
        ("ms-swift", {"rejected_images": ["x.jpg"], "rejected_response": None}, "and so is the response"),
        ("ms-swift", {"rejected_response": None, "rejected_messages": SWIFT["messages"][3:]}, "another prompt"),
        ("ms-swift", {"rejected_messages": SWIFT["messages"]}, "`rejected_response` is not the response of"),
        ("ms-swift", {"images": []}, r"1 image placeholder\(s\), but the row has 0"),
        ("ms-swift", {"videos": [["1.jpg", "2.jpg"]]}, r"`videos`\[0\] is not a path"),
        ("ms-swift", {"images": [{"bytes": "aGk="}]}, r"`images`\[0\] is not a path"),
        ("ms-swift", {"images": 3}, r"`images`\[0\] is 3, no path. Write the name of a file as text"),
        ("mmpr", {"image": 0, "question": "What?"}, r"`image`\[0\] is 0, no path"),
        ("videochat2-it", {"video": 7}, r"`video`\[0\] is 7, no path"),
        ("ms-swift", {"image": "1.jpg"}, "`image` is not supported .* the name that is read .*images videos"),
        ("ms-swift", {"video": "1.mp4"}, "`video` is not supported"),
        ("llamafactory", {"image": "1.jpg"}, "`image` is not supported"),
        ("mmpr", {"images": ["1.jpg"]}, "`images` is not supported"),
        ("lpoi", {"image": "1.jpg"}, "`image` is not supported"),
        ("questions", {"videos": ["1.mp4"]}, "`videos` is not supported"),
        ("ms-swift", {"audios": ["a.wav"]}, "`audios` is not supported"),
        (
            "llamafactory",
            {"conversations": [IMAGE_OF_GPT, *FACTORY["conversations"]]},
            r"not the user's .assistant.. Move",
        ),
        (
            "llamafactory",
            {"system": "Be brief.", "conversations": [{"from": "system", "value": "Hi"}, *FACTORY["conversations"]]},
            "`system` is not the system's turn",
        ),
        ("llamafactory", {"chosen": {"from": "gpt"}}, "`chosen` has no text"),
        ("llamafactory", {"conversations": None, "instruction": "?", "history": ["a"]}, "`history` is not a list"),
        ("llava-hound", {"rejected": "A dog runs. "}, "identical"),
        ("lpoi", {"image_list": ["b.jpg", LPOI["img_path"]]}, "not the first of `image_list`"),
        ("videochat2", {"QA_NEG": VIDEOCHAT2["QA"]}, "answers of `QA` and `QA_NEG` are identical"),
        ("videochat2", {"QA_NEG": [VIDEOCHAT2["QA"][0] | {"q": "Why?"}]}, "asks other questions than `QA`"),
        ("videochat2", {"QA_NEG": None}, "`QA_NEG` is missing or not a list of questions"),
        ("videochat2", {"image": "1.jpg"}, "both `video` and `image`"),
        ("lpoi", {"image_list": ["b.jpg", "b.jpg"]}, "an image is in it twice"),
        *(
            (fmt, {"start": start, "end": end}, f"`start` {start!r} and `end` {end!r} must be seconds")
            for fmt in ("videochat2", "videochat2-it", "questions", "llava-hound-qa")
            for start, end in [(1, None), (3, 2), (2, 2), (-3, 1), (0, math.inf), (True, 2), ("1", 2)]
        ),
        ("rlhf-v", {"text": "What?"}, "`text` is not JSON"),
        ("rlhf-v", {"text": "[]"}, "`text` is not an object"),
        ("rlhf-v", {"image": None, "image_path": None}, "has 0 images"),
        ("rlaif-v", {"image": {"bytes": "aGk="}}, r"`image`\[0\] is not a path, and not the bytes of a medium"),
        ("rlhf-v", {"text": '{"chosen": "a", "chosen": "b"}'}, "has the key 'chosen' twice, for 'a' and 'b'"),
        ("rrpo", {"media_path": "other.mp4"}, "`video` and `media_path` differ"),
        ("llamafactory", {"chosen": {"from": "human", "value": "x"}}, "`chosen` is the user's turn"),
        ("llamafactory", {"messages": FACTORY["conversations"]}, "both `conversations` and `messages`"),
        ("videochat2", {"video": None}, "neither a video nor an image"),
        ("elv-halluc-dpo", {"video": None}, "`video` and `videos` are missing"),
        ("elv-halluc-dpo", {"videos": ["2.mp4"]}, "`video` and `videos` differ"),
        ("elv-halluc-dpo", {"rejected_response": "None."}, "`rejected` and `rejected_response` differ"),
        ("symmpo", {"image_2": []}, "`image_2` has 0 images"),
        ("symmpo", {"resp_2_w": None}, "`resp_2_w` is missing"),
        ("symmpo", {"resp_2_w": "A dog."}, "chosen and other_chosen responses are identical"),
        ("mmpr", {"image": []}, r"1 image placeholder\(s\), but the row has 0"),
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
