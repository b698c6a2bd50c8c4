"""What is found before the first step: every bad file and row by name, and what skipping does."""

import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Video, load_dataset
from families import KINDS, build, text_model
from helpers import message, row, write_clip, write_image
from media_files import needs_pyav
from sentencepiece import SentencePieceTrainer
from transformers import GPTSw3Tokenizer, SiglipTokenizer

import trl_vpo
from trl_vpo.data.blank import blank_encoder
from trl_vpo.data.check import CHUNK, PassedRows, Problem, check_media, check_rows, prepare_dataset
from trl_vpo.data.identity import processor_identity
from trl_vpo.data.rows import ROW_INDEX, read_row
from trl_vpo.errors import RowError
from trl_vpo.media.load import VideoOptions


@pytest.fixture(scope="module")
def processor():
    return build("Qwen2-VL")[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("good") / "good.mp4", frames=40)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def prepare(rows, processor, folder, phrases=False, image_list=False, collator=None, **more):
    args = trl_vpo.VisualDPOConfig(str(folder / "out"), num_frames=8, use_cpu=True, bf16=False, **more)
    data = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    needs = {"phrases": phrases, "image_list": image_list}
    collator = collator or trl_vpo.VisualDPOTrainer.make_collator(processor, args)
    return prepare_dataset(data, args, name="train", processing_class=processor, collator=collator, **needs)


def fast_start(source, target):
    with av.open(source) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_bad(kind, good, folder):
    """A path to a file that is bad in one way."""
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "truncated":
        fast_start(good, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif kind == "no index":
        path.write_bytes(Path(good).read_bytes()[:-400])
    elif kind == "audio only":
        sound(path)
    elif kind == "folder":
        path.mkdir()
    return str(path)


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "truncated", "no index", "audio only", "folder"])
def test_a_bad_file_is_named_before_any_step(kind, good, processor, tmp_path):
    bad = make_bad(kind, good, tmp_path)
    rows = [row("video", [good], id="a", source="b"), row("video", [bad], id="clip-7", source="webvid")]
    with pytest.raises(RowError) as caught:
        prepare(rows, processor, tmp_path)
    text = str(caught.value)
    assert text.startswith("1 of 2 train rows cannot be trained on:\n  - row 1 (id 'clip-7', source 'webvid'): ")
    assert bad in text and "on_bad_media: skip" in text


def test_the_trainer_refuses_before_it_loads_or_trains(processor, tmp_path):
    args = trl_vpo.VisualDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    rows = Dataset.from_list([row("video", [str(tmp_path / "gone.mp4")])])
    with pytest.raises(RowError, match=r"row 0: .*gone\.mp4 does not exist"):
        trl_vpo.VisualDPOTrainer(build("Qwen2-VL")[0], args=args, train_dataset=rows, processing_class=processor)
    with pytest.raises(RowError, match=r"1 of 1 held-out rows .*\n.*gone\.mp4"):
        trl_vpo.VisualDPOTrainer(
            build("Qwen2-VL")[0],
            args=args,
            train_dataset=Dataset.from_list([row(None)]),
            eval_dataset={"held-out": rows},
            processing_class=processor,
        )


def test_an_image_that_is_none(processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_text("<svg/>")
    with pytest.raises(RowError, match=r"row 0: .*a\.png"):
        prepare([row("image", [str(path)])], processor, tmp_path)


def test_paths_must_stay_inside_media_root(good, processor, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(good, root / "in.mp4")
    shutil.copy(good, tmp_path / "out.mp4")
    assert len(prepare([row("video", ["in.mp4"])], processor, tmp_path, media_root=str(root))) == 1
    for path in ("../out.mp4", str(tmp_path / "out.mp4")):
        with pytest.raises(RowError, match="outside of media_root"):
            prepare([row("video", [path])], processor, tmp_path, media_root=str(root))


def test_many_bad_rows_are_counted_and_the_first_are_shown(processor, tmp_path):
    rows = [row("video", [str(tmp_path / f"{i}.mp4")]) for i in range(9)]
    with pytest.raises(RowError) as caught:
        prepare(rows, processor, tmp_path)
    text = str(caught.value)
    assert text.startswith("9 of 9 train rows") and "row 4:" in text and "row 5:" not in text
    assert "and 4 more" in text


@pytest.mark.parametrize("box", [[10, 10, 10, 20], [30, 10, 10, 20], [10, 10, 90, 20], [1, 2, 3]])
def test_boxes_are_checked_against_their_image(box, processor, tmp_path):
    path = write_image(tmp_path / "a.png", (56, 56))
    with pytest.raises(RowError, match=r"row 0: .*56"):
        prepare([row("image", [path], critical_box=box)], processor, tmp_path, image_list=True)


def test_a_text_model_refuses_visual_rows(good, tmp_path):
    with pytest.raises(RowError, match="tokenizer of a text model"):
        prepare([row("video", [good])], text_model()[1], tmp_path)


def test_contract_errors_are_not_skipped(good, processor, tmp_path):
    rows = [row("video", [good]), row("video", [good], chosen="")]
    with pytest.raises(RowError, match="row 1: the chosen response is empty"):
        prepare(rows, processor, tmp_path, on_bad_media="skip")


def test_skipping_leaves_rows_out_and_lists_them(good, processor, tmp_path, capsys):
    bad = make_bad("truncated", good, tmp_path)
    rows = [row("video", [p], id=str(i)) for i, p in enumerate([bad, good, bad, good])]
    kept = prepare(rows, processor, tmp_path, on_bad_media="skip")
    assert kept["id"] == ["1", "3"] and kept["_row_index"] == [1, 3]  # nothing takes their place
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(entry["dataset"], entry["row"]) for entry in listed] == [("train", 0), ("train", 2)]
    assert all(bad in entry["reason"] for entry in listed)
    assert "Skipped 2 of 4 train rows" in capsys.readouterr().out


def test_skipping_finds_what_only_decoding_shows(good, processor, tmp_path):
    """Damage in the middle of a file: the header is fine, so only `decode` (which skip implies) sees it."""
    needs_pyav(17, 0, "the index of frames")
    data = bytearray(Path(good).read_bytes())
    with av.open(good) as container:
        entries = [(e.pos, e.size) for e in container.streams.video[0].index_entries][30:]
    for position, size in entries:
        data[position : position + size] = b"\xff" * size
    path = tmp_path / "middle.mp4"
    path.write_bytes(data)
    rows = [row("video", [str(path)]), row("video", [good])]
    assert len(prepare(rows, processor, tmp_path)) == 2
    with pytest.raises(RowError, match=r"middle\.mp4"):
        prepare(rows, processor, tmp_path, check_media="decode")
    assert prepare(rows, processor, tmp_path, on_bad_media="skip")["_row_index"] == [1]


def test_all_rows_bad_is_an_error_even_when_skipping(processor, tmp_path):
    with pytest.raises(RowError, match="no row of the train dataset has readable media"):
        prepare([row("video", [str(tmp_path / "x.mp4")])], processor, tmp_path, on_bad_media="skip")


def test_an_empty_dataset_is_refused(processor, tmp_path):
    with pytest.raises(RowError, match="the train dataset has no rows"):
        prepare(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), processor, tmp_path)


def test_iterable_datasets_are_checked_at_their_first_row(good, processor, tmp_path):
    rows = [row("video", [str(tmp_path / "x.mp4")]), row("video", [good])]
    with pytest.raises(RowError, match=r"row 0: .*x\.mp4"):
        prepare(Dataset.from_list(rows).to_iterable_dataset(), processor, tmp_path)
    made = prepare(Dataset.from_list(rows[::-1]).to_iterable_dataset(), processor, tmp_path)
    assert [example["_row_index"] for example in made] == [0, 1]
    with pytest.raises(ValueError, match="IterableDataset"):
        prepare(Dataset.from_list(rows).to_iterable_dataset(), processor, tmp_path, on_bad_media="skip")


def test_datasets_video_and_image_columns(good, processor, tmp_path):
    """Rows whose media are `datasets` features, with the bytes inside Arrow, reach the collator undecoded."""
    picture = write_image(tmp_path / "a.png")
    base = Dataset.from_list([row("video", [good]), row("video", [good])])
    video = base.cast(Features({**base.features, "videos": List(Video())}))
    made = prepare(video, processor, tmp_path, check_media="decode")
    assert made[0]["videos"][0]["path"] == good
    base = Dataset.from_list([row("image", [picture])])
    image = base.cast(Features({**base.features, "images": List(Image())}))
    tree = trl_vpo.PreferenceCollator(processor).encode(prepare(image, processor, tmp_path)[0])
    plain = trl_vpo.PreferenceCollator(processor).encode(row("image", [picture]))
    assert (tree.trunks[0].media["pixel_values"] == plain.trunks[0].media["pixel_values"]).all()


@pytest.mark.parametrize("stored", ["arrow", "parquet"])
def test_streams_of_datasets_videos_are_not_decoded_by_datasets(good, processor, tmp_path, stored):
    """That needs torchcodec; images of a stream stay images."""
    picture = write_image(tmp_path / "a.png")
    rows = [row("video", [good], images=None), row("image", [picture], videos=None)]
    base = Dataset.from_list(rows)
    data = base.cast(Features({**base.features, "videos": List(Video()), "images": List(Image())}))
    if stored == "arrow":
        stream = data.to_iterable_dataset()
    else:
        data.to_parquet(tmp_path / "rows.parquet")
        path = str(tmp_path / "rows.parquet")
        stream = load_dataset("parquet", data_files=path, split="train", streaming=True)
    clip, shown = prepare(stream, processor, tmp_path)
    assert clip[ROW_INDEX] == 0 and clip["videos"][0]["path"] == good and shown["images"][0].size == (56, 56)
    for made, plain in ((clip, rows[0]), (shown, rows[1])):
        want = trl_vpo.PreferenceCollator(processor).encode(plain).trunks[0].media
        got = trl_vpo.PreferenceCollator(processor).encode(made).trunks[0].media
        assert want and all((got[key] == value).all() for key, value in want.items())


@pytest.mark.parametrize("stream", [False, True])
def test_image_columns_start_at_media_root_in_training_too(processor, tmp_path, stream):
    picture = write_image(tmp_path / "a.png")
    base = Dataset.from_list([row("image", ["a.png"])])
    data = base.cast(Features({**base.features, "images": List(Image())}))
    data = data.to_iterable_dataset() if stream else data
    (example,) = prepare(data, processor, tmp_path, media_root=str(tmp_path))
    tree = trl_vpo.PreferenceCollator(processor, media_root=str(tmp_path)).encode(example)
    plain = trl_vpo.PreferenceCollator(processor).encode(row("image", [picture]))
    assert (tree.trunks[0].media["pixel_values"] == plain.trunks[0].media["pixel_values"]).all()


def test_an_empty_stream_is_refused(processor, tmp_path):
    with pytest.raises(RowError, match="the train dataset has no rows"):
        prepare(Dataset.from_list([row(None)]).to_iterable_dataset().take(0), processor, tmp_path)


def test_jsonl_with_rows_of_different_kinds(good, processor, tmp_path):
    picture = write_image(tmp_path / "a.png")
    rows = [row("image", [picture], id="i"), row("video", [good], id="v"), row(None, id="t")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"images": None, "videos": None, **r}) + "\n" for r in rows))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    made = prepare(data, processor, tmp_path)
    batch = trl_vpo.PreferenceCollator(processor)([made[i] for i in range(3)])
    assert [sorted(m) for m in batch["media"]] == [
        ["image_grid_thw", "pixel_values"],
        ["pixel_values_videos", "video_grid_thw"],
        [],
    ]
    assert batch["names"] == ["row 0 (id 'i')", "row 1 (id 'v')", "row 2 (id 't')"]


def test_rows_are_numbered_as_the_user_sees_them_after_shuffling(good, processor, tmp_path):
    data = Dataset.from_list([row("video", [good], id=str(i)) for i in range(5)]).shuffle(seed=1)
    made = prepare(data, processor, tmp_path)
    assert made["_row_index"] == list(range(5)) and made["id"] == data["id"]


def test_two_placeholders_and_one_video(good, processor, tmp_path):
    broken = row("video", [good]) | {"prompt": message("user", "<video>", "<video>", "What?")}
    with pytest.raises(RowError, match=r"row 0: the prompt has 2 video placeholder\(s\)"):
        prepare([broken], processor, tmp_path)


def test_string_prompts_are_checked_for_the_models_own_placeholders(processor, tmp_path):
    fine = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>What?", "chosen": "a", "rejected": "b"}
    fine["images"] = [write_image(tmp_path / "a.png")]
    assert len(prepare([fine], processor, tmp_path)) == 1
    with pytest.raises(RowError, match=r"1 of 3 .*\n.*row 2: the prompt has 2 image placeholder\(s\) \('<\|vision_st"):
        placed = fine | {"prompt": "<image>What?"}
        prepare([fine, placed, fine | {"prompt": fine["prompt"] * 2}], processor, tmp_path)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "LLaVA-1.5", "SmolVLM", "LLaVA-OneVision", "InternVL"])
def test_placeholder_tokens_in_texts_are_refused(family, tmp_path):
    processor, picture = build(family)[1], write_image(tmp_path / "a.png")
    token = processor.image_token
    good, said = row("image", [picture], id="a"), row("image", [picture], chosen=f"the {token} is red", id="b")
    with pytest.raises(RowError, match=r"1 of 2 .*\n.*row 1 \(id 'b'\): the chosen response holds"):
        prepare([good, said], processor, tmp_path)
    asked = row(None) | {"prompt": message("user", f"What does {token} do?")}
    with pytest.raises(RowError, match="row 0: the prompt holds"):
        prepare([asked], processor, tmp_path)
    plain = {"prompt": "What is red?", "chosen": f"the {token}", "rejected": "nothing"}
    with pytest.raises(RowError, match="row 0: the chosen response holds"):
        prepare([plain], processor, tmp_path)


def test_tags_that_do_not_pair_are_refused(processor, tmp_path):
    for bad in ("a <MASK>blue</MASK> <MASK> car", "a blue</MASK> car"):
        with pytest.raises(RowError, match=r"row 0: the rejected response: .*(never closed|no tag is open)"):
            prepare([row(None, rejected=bad)], processor, tmp_path)
    with pytest.raises(RowError, match=r"row 0: the rejected response: .*never closed"):
        prepare([row(None, chosen="a <MASK>red</MASK> car", rejected="a <MASK>blue car")], processor, tmp_path)


def test_a_lone_tag_is_a_word(processor, tmp_path):
    made = prepare([row(None, chosen="BERT fills <MASK> in.", rejected="It fills gaps in.")], processor, tmp_path)
    tree = trl_vpo.PreferenceCollator(processor).encode(made[0])
    assert processor.tokenizer.decode(tree.branches[0].ids) == "BERT fills <MASK> in.<|im_end|>\n"


def test_markers_are_words_to_a_text_model(processor, tmp_path):
    """A model that sees media would rather have its clip: there they are refused in a plain string."""
    asked = row(None) | {"prompt": [{"role": "user", "content": "How do I use the <video> tag?"}]}
    tok = text_model()[1]
    (made,) = prepare([asked], tok, tmp_path)
    assert "use the <video> tag?<|im_end|>" in tok.decode(trl_vpo.PreferenceCollator(tok).encode(made).trunks[0].ids)
    with pytest.raises(RowError, match=r"row 0: the prompt has a `<video>`, but the row has 0 video\(s\).*words"):
        prepare([asked], processor, tmp_path)
    typed = asked | {"prompt": message("user", "How do I use the <video> tag?")}
    assert len(prepare([typed], processor, tmp_path)) == 1


@pytest.mark.parametrize("family, fits", [("SmolVLM", False), ("InternVL", True), ("Qwen2-VL", True)])
def test_an_image_beside_a_video(family, fits, good, tmp_path):
    both = row("video", [good]) | {"images": [write_image(tmp_path / "a.png")]}
    both["prompt"] = message("user", "<image>", "<video>", "Are they alike?")
    if fits:
        assert len(prepare([both], build(family)[1], tmp_path)) == 1
        return
    with pytest.raises(RowError, match="row 0: has images and videos, but SmolVLMProcessor takes one kind"):
        prepare([both], build(family)[1], tmp_path)


def test_problems_of_many_rows_come_in_their_order():
    """More rows than are in memory at a time."""
    rows = Dataset.from_dict({"id": [str(i) for i in range(3 * CHUNK + 1)]}).add_column(
        ROW_INDEX, range(3 * CHUNK + 1)
    )
    bad = [0, CHUNK - 1, CHUNK, 2 * CHUNK + 7, 3 * CHUNK]
    check = lambda row: Problem(row[ROW_INDEX], row["id"], False) if row[ROW_INDEX] in bad else None  # noqa: E731
    assert [problem.index for problem in check_rows(rows, check, "test")] == bad


# --- lengths and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_row_with_blank_media_is_as_long_as_itself(family, kind, media, images, tmp_path):
    """Every shape twice: the second time a processor's answer is remembered, and the times are those of its clip."""
    processor = build(family)[1]
    collator = trl_vpo.PreferenceCollator(processor, video=VideoOptions(num_frames=8), max_pixels=90 * 50)
    sources = [images[1], images[2], images[1]] if kind == "image" else [*media["video"], media["video"][0]]
    if kind == "video":  # as large and as many frames as the first, at other times
        sources.append(write_clip(tmp_path / "slow.mp4", frames=12, fps=1))
    encode, args = (
        blank_encoder(collator),
        trl_vpo.VisualDPOConfig("x", num_frames=8, max_pixels=90 * 50, use_cpu=True),
    )
    for source in sources:
        example = row(kind, [source])
        want, got = collator.encode(example), encode(check_media(read_row(example), args))
        assert got.trunks[0].ids == want.trunks[0].ids and [b.ids for b in got.branches] == [
            b.ids for b in want.branches
        ]
        shapes = [{k: v.shape for k, v in tree.trunks[0].media.items()} for tree in (got, want)]
        assert shapes[0] == shapes[1]


def test_lists_of_images_are_as_long_as_themselves(images):
    processor = build("Qwen2-VL")[1]
    args = trl_vpo.LPOIConfig("x", num_images=3, use_cpu=True, max_pixels=60 * 50)
    collator = trl_vpo.LPOITrainer.make_collator(processor, args)
    for more in ({"critical_box": [5, 5, 100, 50]}, {"image_list": images}):
        example = row("image", [images[1]], **more) | ({"images": None} if "image_list" in more else {})
        want = collator.encode(example)
        got = blank_encoder(collator)(check_media(read_row(example, image_list=True), args))
        assert len(got.trunks) == 3 and [t.ids for t in got.trunks] == [t.ids for t in want.trunks]


def test_what_would_stop_a_step_is_found_before(good, processor, tmp_path):
    strip = write_image(tmp_path / "strip.png", (4000, 10))
    rows = [row("video", [good], id="fits"), row("video", [good], id="long", rejected="red " * 90)]
    rows = [{"images": [], **made} for made in rows] + [row("image", [strip], id="strip", videos=[])]
    with pytest.raises(RowError) as caught:
        prepare(rows, processor, tmp_path, max_length=90)
    assert str(caught.value).startswith("2 of 3 train rows cannot be trained on:\n  - row 1 (id 'long'): ")
    assert "more than max_length=90" in str(caught.value)
    assert "row 2 (id 'strip'): Qwen2VLProcessor refuses" in str(caught.value) and "aspect ratio" in str(caught.value)
    with pytest.raises(RowError, match="row 0: "):
        mixed = row("video", [good], images=[write_image(tmp_path / "a.png")])
        mixed["prompt"] = message("user", "<image>", "<video>", "What?")
        prepare([mixed], build("SmolVLM")[1], tmp_path)


def test_what_a_template_refuses_is_found_before(tmp_path):
    tok = text_model()[1]
    tok.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tok.chat_template += "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bad = row(None) | {"prompt": message("system", "Be brief.") + message("user", "What?")}
    with pytest.raises(RowError, match=r"1 of 2 .*\n.*row 1: .*no system role"):
        prepare([row(None), bad], tok, tmp_path)
    with pytest.raises(RowError, match="no system role"):  # whatever is known of media
        prepare([row(None), bad], tok, tmp_path, check_media="off")


def test_rows_that_passed_are_not_checked_again(good, processor, tmp_path, monkeypatch):
    """A damaged file that was remembered as good shows that nobody looked: size, times, head and tail are the same."""
    clips = [str(shutil.copy(good, tmp_path / f"{i}.mp4")) for i in range(3)]
    rows = [row("video", [clip], id=str(i)) for i, clip in enumerate(clips)]
    prepare(rows[:2], processor, tmp_path)
    seen = []
    check = lambda example: seen.append(example["id"])  # noqa: E731
    args = trl_vpo.VisualDPOConfig(str(tmp_path), num_frames=8, use_cpu=True)

    def looked_at(**changes):
        seen.clear()
        passed = PassedRows(args, trl_vpo.PreferenceCollator(processor, **{"video": args.video_options()} | changes))
        data = Dataset.from_list(rows).add_column(ROW_INDEX, range(3))
        check_rows(data, check, "test", passed=passed)
        return sorted(seen)

    assert looked_at() == ["2"] and looked_at() == []
    assert looked_at(max_length=900) == looked_at(phrases=True) == ["0", "1", "2"]
    times = Path(clips[0]).stat()
    Path(clips[0]).write_bytes(Path(good).read_bytes()[:-1] + b"x")
    os.utime(clips[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    rows[1] = row("video", [clips[1]], id="1", chosen="a red circle")
    assert looked_at() == ["0", "1"]
    rows[2]["id"] = "renamed"
    assert looked_at() == []
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
        assert looked_at() == ["0", "1", "renamed"]
    processor = build("Qwen3-VL")[1]
    assert looked_at() == ["0", "1", "renamed"]


@pytest.mark.parametrize("kind", [GPTSw3Tokenizer, SiglipTokenizer])
def test_a_tokenizer_whose_vocabulary_is_no_text(kind, tmp_path):
    """SentencePiece's files are binary. Two of them differ; one and the same is recognised."""
    tokenizers = []
    for name, text in (("a", "a red square moves left."), ("b", "what is in the picture?")):
        trained = {"model_prefix": str(tmp_path / name), "vocab_size": 40, "hard_vocab_limit": False}
        SentencePieceTrainer.train(sentence_iterator=iter([text] * 4), minloglevel=2, **trained)
        tokenizers.append(kind(str(tmp_path / f"{name}.model"), name_or_path="a"))
        tokenizers[-1].chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    first, other = map(processor_identity, tokenizers)
    assert first == processor_identity(kind(str(tmp_path / "a.model"), chat_template=tokenizers[0].chat_template))
    assert dict(first)["spiece.model"] != dict(other)["spiece.model"]
    assert len(prepare([row(None)], tokenizers[0], tmp_path)) == 1


def test_worker_processes_find_the_same(processor, tmp_path):
    rows = [row(None, id=str(i), chosen=f"a {i}") for i in range(CHUNK + 3)]
    rows[CHUNK + 1]["rejected"] = message("assistant", "")
    rows[3] = row("video", [str(tmp_path / "gone.mp4")], id="3")
    state = torch.get_rng_state()
    for workers in (0, 2):
        with pytest.raises(RowError) as caught:
            prepare(rows, processor, tmp_path, dataloader_num_workers=workers)
        found = str(caught.value)
        assert "row 3 " in found and f"row {CHUNK + 1} " in found and found.startswith(f"2 of {CHUNK + 3} ")
    assert (torch.get_rng_state() == state).all()


# --- columns ------------------------------------------------------------------------------------------------------


def test_a_row_index_of_the_users_own_does_not_switch_checks_off(processor, tmp_path):
    rows = [row(None, _row_index=7), row(None, chosen="", _row_index=8)]
    with pytest.raises(RowError, match="row 1: the chosen response is empty"):
        prepare(rows, processor, tmp_path)
    made = prepare(rows[:1], processor, tmp_path)
    assert made[0][ROW_INDEX] == 0


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
        return {name: [made[name] for made in rows] for name in rows[0]}

    data = Dataset.from_dict({"file": images, "id": ["a", "b", "c"]}).with_transform(shown)
    if unused:
        with pytest.raises(RowError, match=r"rows 0 to .*KeyError: 'file'\)\. It was given `id`\. Set remove_unused"):
            prepare(data, processor, tmp_path)
        return
    made = prepare(data, processor, tmp_path, remove_unused_columns=False)
    assert made[1][ROW_INDEX] == 1 and made[[0, 2]][ROW_INDEX] == [0, 2]
    collator = trl_vpo.PreferenceCollator(processor)
    assert collator([made[2]])["names"] == ["row 2"]
    again = prepare(made.select([1, 2]), processor, tmp_path, remove_unused_columns=False)  # as another trainer would
    assert collator([again[1]])["names"] == ["row 1"] and again[1]["images"] == made[2]["images"]


def test_skipped_rows_are_listed_once(good, processor, tmp_path):
    bad = make_bad("empty", good, tmp_path)
    rows = [row("video", [p], id=str(i)) for i, p in enumerate([bad, good, bad])]
    for _ in range(2):
        prepare(rows, processor, tmp_path, on_bad_media="skip")
        args = trl_vpo.VisualDPOConfig(str(tmp_path / "out"), use_cpu=True, on_bad_media="skip")
        more = {"processing_class": processor, "phrases": False, "image_list": False}
        prepare_dataset(Dataset.from_list(rows[:2]), args, name="eval", **more)
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert sorted((entry["dataset"], entry["row"]) for entry in listed) == [("eval", 0), ("train", 0), ("train", 2)]
