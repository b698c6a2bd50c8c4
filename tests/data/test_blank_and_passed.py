"""Rows with blank media are as long as themselves; rows that passed are not checked again."""

import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from families import KINDS, build
from helpers import row, write_clip
from prepared import prepare
from sentencepiece import SentencePieceTrainer
from transformers import GPTSw3Tokenizer, SiglipTokenizer

import trl_vpo
from trl_vpo.data.blank import blank_encoder
from trl_vpo.data.check import check_media, check_rows
from trl_vpo.data.identity import processor_identity
from trl_vpo.data.passed_rows import PassedRows
from trl_vpo.data.rows import ROW_INDEX, read_row
from trl_vpo.media.load import VideoOptions


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_row_with_blank_media_is_as_long_as_itself(family, kind, media, images, tmp_path):
    """Every shape twice: the second time a processor's answer is remembered, and the times are those of its clip."""
    processor = build(family)[1]
    collator = trl_vpo.PreferenceCollator(processor, video=VideoOptions(num_frames=8), max_pixels=90 * 50)
    sources = [images[1], images[2], images[1]] if kind == "image" else [*media["video"], media["video"][0]]
    if kind == "video":  # as large and as many frames as the first, at other times
        sources.append(write_clip(tmp_path / "slow.mp4", frames=12, fps=1))
    args = trl_vpo.VisualDPOConfig("x", num_frames=8, max_pixels=90 * 50, use_cpu=True)
    encode = blank_encoder(collator)
    for source in sources:
        example = row(kind, [source])
        want, got = collator.encode(example), encode(check_media(read_row(example), args))
        assert got.trunks[0].ids == want.trunks[0].ids
        assert [b.ids for b in got.branches] == [b.ids for b in want.branches]
        shapes = [{k: v.shape for k, v in tree.trunks[0].media.items()} for tree in (got, want)]
        assert shapes[0] == shapes[1]


def test_lists_of_images_are_as_long_as_themselves(images):
    processor = build("Qwen2-VL")[1]
    args = trl_vpo.LPOIConfig("x", num_images=3, use_cpu=True, max_pixels=60 * 50)
    collator = trl_vpo.LPOITrainer.make_collator(processor, args)
    for more in ({"critical_box": [5, 5, 100, 50]}, {"image_list": images}):
        example = row("image", [images[1]], **more) | ({"images": None} if "image_list" in more else {})
        want = collator.encode(example)
        got = blank_encoder(collator)(check_media(read_row(example, media_form="ranking"), args))
        assert len(got.trunks) == 3 and [t.ids for t in got.trunks] == [t.ids for t in want.trunks]


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
        own = {"video": args.video_options(), "media_form": args.media_form}
        passed = PassedRows(args, trl_vpo.PreferenceCollator(processor, **own | changes))
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
