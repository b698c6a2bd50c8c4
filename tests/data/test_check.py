"""The check before the first step: every bad file and row is named, and skipping leaves rows out."""

import json
from contextlib import nullcontext
from pathlib import Path

import av
import pytest
import torch
from datasets import Dataset
from families import SQUARE, build, text_model, tokenizer
from helpers import message, row, write_clip, write_image
from media_files import cut, needs_pyav, write_video
from prepared import prepare
from transformers import Blip2Processor, BlipImageProcessor

import trl_vpo
from trl_vpo.data.check import CHUNK, Problem, check_rows
from trl_vpo.data.rows import ROW_INDEX
from trl_vpo.errors import RowError


@pytest.fixture
def bad(tmp_path):
    """A path to a file that is cut short."""
    return str(cut(write_video(tmp_path / "whole.mp4", options={"movflags": "faststart"}), tmp_path / "bad.mp4", 0.6))


def test_a_bad_file_is_named_before_any_step(good, bad, processor, tmp_path):
    rows = [row("video", [good], id="a", source="b"), row("video", [bad], id="clip-7", source="webvid")]
    with pytest.raises(RowError) as caught:
        prepare(rows, processor, tmp_path)
    text = str(caught.value)
    assert text.startswith("1 of 2 train rows cannot be trained on:\n  - row 1 (id 'clip-7', source 'webvid'): ")
    assert bad in text and "on_bad_media: skip" in text


def test_the_trainer_refuses_before_it_loads_or_trains(processor, tmp_path):
    kwargs = {"args": trl_vpo.VisualDPOConfig(str(tmp_path), use_cpu=True), "processing_class": processor}
    model, rows = build("Qwen2-VL")[0], Dataset.from_list([row("video", [str(tmp_path / "gone.mp4")])])
    with pytest.raises(RowError, match=r"row 0: .*gone\.mp4 does not exist"):
        trl_vpo.VisualDPOTrainer(model, train_dataset=rows, **kwargs)
    fine = Dataset.from_list([row(None)])
    with pytest.raises(RowError, match=r"1 of 1 held-out rows .*\n.*gone\.mp4"):
        trl_vpo.VisualDPOTrainer(model, train_dataset=fine, eval_dataset={"held-out": rows}, **kwargs)


def test_bad_images_and_boxes_are_named(processor, tmp_path):
    (tmp_path / "a.png").write_text("<svg/>")
    with pytest.raises(RowError, match=r"row 0: .*a\.png"):
        prepare([row("image", [str(tmp_path / "a.png")])], processor, tmp_path)
    path = write_image(tmp_path / "b.png", (56, 56))
    for box in ([10, 10, 10, 20], [10, 10, 90, 20], [1, 2, 3]):
        with pytest.raises(RowError, match=r"row 0: .*56"):
            prepare([row("image", [path], critical_box=box)], processor, tmp_path, config=trl_vpo.LPOIConfig)


def test_spans_and_boxes_of_clips_are_named(processor, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", frames=12, fps=10)
    for more, says in (
        ({"critical_span": [1, 3]}, "a.mp4 ends behind the video, which is 1.20 s long"),
        ({"critical_span": [0.01, 0.02]}, "a.mp4 holds none of the 8 sampled frames"),
        ({"critical_box": [0, 0, 90, 20]}, "in an image of 64x64 pixels reaches outside"),
    ):
        with pytest.raises(RowError, match=rf"row 0: critical_.*{says}"):
            prepare([row("video", [clip], **more)], processor, tmp_path, config=trl_vpo.LPOIConfig, max_pixels=1000)
    good = [row("video", [clip], critical_span=[0.5, 1.2]), row("video", [clip], critical_box=[0, 0, 60, 20])]
    good = [{"critical_span": None, "critical_box": None} | r for r in good]
    assert len(prepare(good, processor, tmp_path, config=trl_vpo.LPOIConfig, max_pixels=1000)) == 2


def test_many_bad_rows_are_counted_and_the_first_are_shown(processor, tmp_path):
    rows = [row("video", [str(tmp_path / f"{i}.mp4")]) for i in range(9)]
    with pytest.raises(RowError, match=r"^9 of 9 train rows (.*\n){5}.* row 4: .*\n.*and 4 more"):
        prepare(rows, processor, tmp_path)


def test_worker_processes_find_the_same(processor, tmp_path):
    rows = [row(None, id=str(i), chosen=f"a {i}") for i in range(CHUNK + 3)]
    rows[CHUNK + 1]["rejected"] = message("assistant", "")
    rows[3] = row("video", [str(tmp_path / "gone.mp4")], id="3")
    state = torch.get_rng_state()
    for workers in (0, 2):
        with pytest.raises(RowError, match=rf"^2 of {CHUNK + 3} .*\n.*row 3 .*\n.*row {CHUNK + 1} "):
            prepare(rows, processor, tmp_path, dataloader_num_workers=workers)
    assert (torch.get_rng_state() == state).all()


def test_problems_of_many_rows_come_in_their_order():
    """More rows than are in memory at a time."""
    count = 3 * CHUNK + 1
    rows = Dataset.from_dict({"id": [str(i) for i in range(count)], ROW_INDEX: range(count)})
    bad = [0, CHUNK - 1, CHUNK, 2 * CHUNK + 7, 3 * CHUNK]
    check = lambda row: Problem(row[ROW_INDEX], row["id"], False) if row[ROW_INDEX] in bad else None  # noqa: E731
    assert [problem.index for problem in check_rows(rows, check, "test")] == bad


def test_a_dataset_without_rows_is_refused(processor, tmp_path):
    empty = Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
    for data in (empty, Dataset.from_list([row(None)]).to_iterable_dataset().take(0)):
        with pytest.raises(RowError, match="the train dataset has no rows"):
            prepare(data, processor, tmp_path)


def test_contract_errors_are_not_skipped(good, processor, tmp_path):
    rows = [row("video", [good]), row("video", [good], chosen="")]
    with pytest.raises(RowError, match="row 1: the chosen response is empty"):
        prepare(rows, processor, tmp_path, on_bad_media="skip")


def test_skipping_leaves_rows_out_and_lists_them(good, bad, processor, tmp_path, capsys):
    rows = [row("video", [p], id=str(i)) for i, p in enumerate([bad, good, bad, good])]
    kept = prepare(rows, processor, tmp_path, on_bad_media="skip")
    assert kept["id"] == ["1", "3"] and kept["_row_index"] == [1, 3]  # nothing takes their place
    assert "Skipped 2 of 4 train rows" in capsys.readouterr().out
    prepare(rows, processor, tmp_path, on_bad_media="skip", name="eval")
    prepare(rows[1:], processor, tmp_path, on_bad_media="skip")  # again: its lines take the place of the first ones
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(entry["dataset"], entry["row"]) for entry in listed] == [("eval", 0), ("eval", 2), ("train", 1)]
    assert all(bad in entry["reason"] for entry in listed)


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


def test_a_text_model_refuses_visual_rows(good, tmp_path):
    with pytest.raises(RowError, match="tokenizer of a text model"):
        prepare([row("video", [good])], text_model()[1], tmp_path)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "LLaVA-1.5", "SmolVLM", "LLaVA-OneVision", "InternVL"])
def test_placeholder_tokens_in_texts_are_refused(family, tmp_path):
    processor, picture = build(family)[1], write_image(tmp_path / "a.png")
    token = processor.image_token
    fine, bad = row("image", [picture], id="a"), row("image", [picture], chosen=f"the {token} is red", id="b")
    with pytest.raises(RowError, match=r"1 of 2 .*\n.*row 1 \(id 'b'\): the chosen response holds"):
        prepare([fine, bad], processor, tmp_path)
    asked = row(None) | {"prompt": message("user", f"What does {token} do?")}
    with pytest.raises(RowError, match="row 0: the prompt holds"):
        prepare([asked], processor, tmp_path)
    plain = {"prompt": "What is red?", "chosen": f"the {token}", "rejected": "nothing"}
    with pytest.raises(RowError, match="row 0: the chosen response holds"):
        prepare([plain], processor, tmp_path)


def test_a_placeholder_token_may_be_no_string(tmp_path):
    """BLIP's processors add theirs to the tokenizer themselves."""
    processor = Blip2Processor(BlipImageProcessor(size=SQUARE), tokenizer(), num_query_tokens=4)
    base = {"prompt": "What?", "rejected": "left", "images": [write_image(tmp_path / "a.png")]}
    rows = [base | {"chosen": "up"}, base | {"chosen": "<image>"}]
    with pytest.raises(RowError, match=r"1 of 2 .*\n.*row 1: the chosen response holds '<image>'"):
        prepare(rows, processor, tmp_path)


def test_markers_are_words_to_a_text_model(processor, tmp_path):
    """A model that sees media would rather have its clip: there they are refused in a plain string."""
    asked = row(None) | {"prompt": [{"role": "user", "content": "How do I use the <video> tag?"}]}
    tok = text_model()[1]
    (example,) = prepare([asked], tok, tmp_path)
    assert "use the <video> tag?<|im_end|>" in tok.decode(
        trl_vpo.PreferenceCollator(tok).encode(example).trunks[0].ids
    )
    with pytest.raises(RowError, match=r"row 0: the prompt has a `<video>`, but the row has 0 video\(s\).*words"):
        prepare([asked], processor, tmp_path)
    typed = asked | {"prompt": message("user", "How do I use the <video> tag?")}
    assert len(prepare([typed], processor, tmp_path)) == 1


@pytest.mark.parametrize("family, fits", [("SmolVLM", False), ("InternVL", True), ("Qwen2-VL", True)])
def test_an_image_beside_a_video(family, fits, good, tmp_path):
    both = row("video", [good]) | {"images": [write_image(tmp_path / "a.png")]}
    both["prompt"] = message("user", "<image>", "<video>", "Are they alike?")
    one_kind = pytest.raises(RowError, match="row 0: has images and videos, but SmolVLMProcessor takes one kind")
    with nullcontext() if fits else one_kind:
        prepare([both], build(family)[1], tmp_path)


def test_what_would_stop_a_step_is_found_before(good, processor, tmp_path):
    strip = write_image(tmp_path / "strip.png", (4000, 10))
    rows = [row("video", [good], id="fits"), row("video", [good], id="long", rejected="red " * 90)]
    rows = [{"images": [], **example} for example in rows] + [row("image", [strip], id="strip", videos=[])]
    long, refuses = "row 1 .id 'long'.: .* more than max_length=90", "row 2 .id 'strip'.: Qwen2VLProcessor refuses"
    with pytest.raises(RowError, match=rf"^2 of 3 train rows .*\n.*{long}.*\n.*{refuses}.*aspect ratio"):
        prepare(rows, processor, tmp_path, max_length=90)


def test_what_a_template_refuses_is_found_before(tmp_path):
    tok = text_model()[1]
    tok.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role.') }}{% endif %}"
    tok.chat_template += "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bad = row(None) | {"prompt": message("system", "Be brief.") + message("user", "What?")}
    with pytest.raises(RowError, match=r"1 of 2 .*\n.*row 1: .*no system role\. Rewrite"):
        prepare([row(None), bad], tok, tmp_path)
    with pytest.raises(RowError, match="no system role"):  # whatever is known of media
        prepare([row(None), bad], tok, tmp_path, check_media="off")
