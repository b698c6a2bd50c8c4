"""Frames have the size that the official preprocessing of a model gives them, by one resize."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES, build
from helpers import row, write_clip
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import trl_vpo
from trl_vpo.data.blank import blank_encoder
from trl_vpo.data.check import check_media
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.inputs import Inputs, load_media
from trl_vpo.data.rows import read_row
from trl_vpo.media.budget import budget_of_run, video_budget
from trl_vpo.media.load import Clip, VideoOptions, load_video
from trl_vpo.models.local import LocalModel
from trl_vpo.training.start import describe_media

PUBLISHED = {  # size of the video processor in the checkpoints on the Hub
    "Qwen2-VL": {"shortest_edge": 3136, "longest_edge": 12845056},
    "Qwen2.5-VL": {"shortest_edge": 3136, "longest_edge": 12845056},
    "Qwen3-VL": {"shortest_edge": 4096, "longest_edge": 25165824},
}
SHAPES = {"1080p": (1920, 1080), "portrait": (1080, 1920), "720p": (1280, 720), "tiny": (64, 48), "strip": (1900, 30)}


def published(family, model=False):
    """The processor of a family with its published size, and perhaps its tiny model."""
    tiny, processor = build(family)
    processor.video_processor.size = dict(PUBLISHED[family])
    return (tiny, processor) if model else processor


def official(width, height, frames, factor, total=None):
    """`fetch_video` and `smart_resize` of qwen-vl-utils 0.0.14, and `total` pixels where a processor has them."""
    least, most, tokens = 128 * factor**2, 768 * factor**2, 128000 * 0.9
    most = max(min(most, tokens * factor**2 / frames * 2), int(least * 1.05))
    most = min(most, total / frames) if total else most
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > most:
        beta = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < least:
        beta = math.sqrt(least / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return w, h


@pytest.mark.parametrize("family", PUBLISHED)
def test_sizes_are_the_official_ones(family):
    budget, random = video_budget(published(family)), np.random.default_rng(0)
    factor, total = (32, 25165824) if family == "Qwen3-VL" else (28, None)
    cases = [(*size, frames) for size in SHAPES.values() for frames in (2, 16, 64)]
    cases += (random.integers([16, 16, 1], [2600, 2600, 90], (2000, 3)) * [1, 1, 2]).tolist()
    for width, height, frames in cases:
        assert budget.size(width, height, frames) == official(width, height, frames, factor, total)
    assert [budget.limits(n) for n in (1, 63)] == [budget.limits(n) for n in (2, 64)]  # the last frame is repeated


@pytest.mark.parametrize(
    ("family", "frames", "before", "tokens"),
    [
        ("Qwen2-VL", 16, 21528, 5760),
        ("Qwen2.5-VL", 16, 21528, 5760),
        ("Qwen2.5-VL", 64, 86112, 23040),
        ("Qwen3-VL", 16, 12064, 5760),
        ("Qwen3-VL", 64, 11648, 11648),
    ],
)
def test_tokens_of_full_hd(family, frames, before, tokens):
    processor = published(family)
    assert processor.video_processor.get_num_of_video_patches(frames, 1080, 1920, {}) == 4 * before
    for width, height in (SHAPES["1080p"], SHAPES["portrait"]):
        wide, high = video_budget(processor).size(width, height, frames)
        assert wide * high // video_budget(processor).factor ** 2 * frames // 2 == tokens
    processor.video_processor.size = video_budget(processor).processor_size(frames)  # as model cards show it
    assert processor.video_processor.get_num_of_video_patches(frames, 1080, 1920, {}) == 4 * tokens


def test_several_videos_share_the_total():
    alone, many = (video_budget(published("Qwen3-VL")).shared(n) for n in (1, 4))
    assert alone.limits(16)[1] == 768 * 32**2 and many.limits(16)[1] == 25165824 / 64
    many = video_budget(published("Qwen2.5-VL")).shared(10)
    assert many.limits(64)[1] == 2 * 0.9 * 128000 * 28**2 / 640
    assert many.limits(640)[1] == int(1.05 * 128 * 28**2)  # the official floor


def test_who_has_a_budget():
    assert {family for family in FAMILIES if video_budget(build(family)[1])} == set()  # their tiny sizes stay
    for family in PUBLISHED:
        processor = published(family)
        assert video_budget(processor) and video_budget(processor, max_pixels=10**9) is None
        processor.video_processor.do_resize = False
        assert video_budget(processor) is None
    assert video_budget(build("Qwen2.5-VL")[1].tokenizer) is None


def test_what_a_run_says_of_it():
    processor, args = published("Qwen3-VL"), trl_vpo.VisualDPOConfig("x", use_cpu=True)
    trainer = SimpleNamespace(processing_class=processor, args=args, train_dataset=Dataset.from_dict({"videos": []}))
    text = "131,072 to 786,432 pixels a frame, as qwen-vl-utils 0.0.14, and at most 25,165,824 in all"
    assert str(budget_of_run(trainer)) == text
    text = "16 frames of a video, at most 786,432 pixels a frame (the model's own budget)"
    assert describe_media(args, processor, ["videos", "id"]) == text
    both = describe_media(args, processor, ["videos", "images"])
    assert both == text + "; images, as large as the processor makes them"
    trainer.train_dataset = Dataset.from_dict({"images": []})
    assert budget_of_run(trainer) is None


def test_what_a_run_says_of_max_pixels():
    processor, args = published("Qwen2.5-VL"), trl_vpo.VisualDPOConfig("x", use_cpu=True, max_pixels=150528)
    rounded = "16 frames of a video, images, at most about 150,528 pixels each"
    assert describe_media(args, processor, ["videos", "images"]) == rounded
    args.max_pixels, least = 1000, processor.video_processor.size["shortest_edge"]
    text = f"16 frames of a video, about {least:,} pixels each: the processor makes none smaller"
    assert describe_media(args, processor, ["videos"]).startswith(text)


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two of one size, larger than a frame may be, and a small one."""
    folder = tmp_path_factory.mktemp("budget")
    sizes = [("large", (1280, 720)), ("other", (1280, 720)), ("small", (96, 64))]
    return {
        name: write_clip(folder / f"{name}.mp4", frames=6, size=size, seed=i) for i, (name, size) in enumerate(sizes)
    }


def media_of(collator, *sources):
    return collator.encode(row("video", sources)).trunks[0].media


def never_resizes(*args, **kwargs):
    raise AssertionError("resized twice")


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_frames_are_resized_once_and_as_officially(family, frames, clips, monkeypatch):
    processor, options = published(family), VideoOptions(num_frames=frames)
    native = load_video(clips["large"], options).frames
    budget = video_budget(processor)
    size = budget.size(1280, 720, frames)
    pixels = resize(
        torch.from_numpy(native).permute(0, 3, 1, 2), size[::-1], InterpolationMode.BICUBIC, antialias=True
    )
    pixels = pixels if frames > 1 else pixels.repeat(2, 1, 1, 1)  # Qwen3-VL refuses one frame
    want = processor.video_processor([pixels], do_resize=False, do_sample_frames=False, return_tensors="pt")
    monkeypatch.setattr(type(processor.video_processor), "resize", never_resizes)
    got = media_of(PreferenceCollator(processor, video=options), clips["large"])
    assert got["video_grid_thw"].tolist() == want["video_grid_thw"].tolist()
    assert (got["pixel_values_videos"] - want["pixel_values_videos"]).abs().mean() < 0.02  # 1 of 255 is 0.015


def test_a_row_of_videos_keeps_to_the_total(clips):
    processor = published("Qwen3-VL")
    processor.video_processor.size = {"shortest_edge": 4096, "longest_edge": 768 * 32**2}
    grids = media_of(PreferenceCollator(processor), clips["large"], clips["other"])["video_grid_thw"]
    assert 600_000 < sum(math.prod(grid) * 2 * 16**2 for grid in grids.tolist()) <= 768 * 32**2


def test_small_frames_are_enlarged_and_images_stay(clips):
    processor = published("Qwen2.5-VL")
    collator = PreferenceCollator(processor, video=VideoOptions(num_frames=2))
    assert media_of(collator, clips["small"])["video_grid_thw"].tolist() == [[1, 20, 28]]
    assert media_of(replace(collator, max_pixels=10**9), clips["small"])["video_grid_thw"].tolist() == [[1, 4, 6]]
    image = np.zeros((60, 90, 3), np.uint8)
    plain = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
    both = row("video", [clips["small"]]) | {"images": [image]}
    both["prompt"][0]["content"].insert(0, {"type": "image"})
    media = collator.encode(both).trunks[0].media
    assert media["image_grid_thw"].tolist() == plain.tolist() and media["video_grid_thw"].tolist() == [[1, 20, 28]]


def test_max_pixels_takes_the_place_of_the_budget(clips):
    processor, options = published("Qwen2.5-VL"), VideoOptions(num_frames=2)
    frames = load_video(clips["large"], options).frames
    want = processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")
    collator = PreferenceCollator(processor, video=options)
    got = media_of(replace(collator, max_pixels=10**9), clips["large"])
    torch.testing.assert_close(got["pixel_values_videos"], want["pixel_values_videos"])  # as large as it makes them
    grids = [media_of(collator, {"path": clips["large"], "max_pixels": n})["video_grid_thw"] for n in (10**6, 50176)]
    assert [grid.tolist() for grid in grids] == [[[1, 52, 92]], [[1, 12, 20]]]  # the row's own, more and less


def test_rows_are_as_long_as_in_their_check(clips):
    processor = published("Qwen3-VL")
    args = trl_vpo.VisualDPOConfig("x", num_frames=4, use_cpu=True)
    collator = trl_vpo.VisualDPOTrainer.make_collator(processor, args)
    for sources in ([clips["large"]], [clips["large"], clips["other"]], [{"path": clips["small"], "num_frames": 1}]):
        example = row("video", sources)
        blank = check_media(read_row(example), args, video_budget(processor))
        want, got = collator.encode(example).trunks[0], blank_encoder(collator)(blank).trunks[0]
        assert got.ids == want.ids and got.media["video_grid_thw"].tolist() == want.media["video_grid_thw"].tolist()


def test_evaluation_sees_the_frames_of_training(clips):
    """However a request gets its clips: with the model's budget, or in the size of the file."""
    tiny, processor = published("Qwen2.5-VL", model=True)
    example = row("video", [clips["large"], clips["other"]])
    options = VideoOptions(num_frames=2)
    want = PreferenceCollator(processor, video=options).encode(example).trunks[0]
    model = LocalModel(tiny, processor)
    (source,) = Inputs(Dataset.from_list([example]), ["0"])
    for budget, most in ((model.video_budget, 0), (None, 0.02)):
        media = load_media(source, options, budget)
        got = model.encode(replace(read_row(example), videos=list(media.videos))).trunks[0]
        assert got.ids == want.ids
        assert (got.media["pixel_values_videos"] - want.media["pixel_values_videos"]).abs().mean() <= most


def test_a_cached_clip_belongs_to_its_budget(clips, tmp_path):
    options, budget = VideoOptions(num_frames=2), video_budget(published("Qwen2.5-VL"))
    for _ in range(2):
        shapes = [load_video(clips["small"], options, budget=b, cache=tmp_path).frames.shape for b in (None, budget)]
        assert shapes == [(2, 64, 96, 3), (2, 280, 392, 3)]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_list_of_frames_has_the_budget(clips):
    budget = video_budget(published("Qwen2.5-VL"))
    clip = load_video(list(np.zeros((3, 720, 1280, 3), np.uint8)), VideoOptions(), budget=budget)
    assert isinstance(clip, Clip) and clip.frames.shape == (3, 560, 1008, 3)
