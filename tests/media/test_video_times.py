"""Times of frames as each family's processor reads them: literal values, and its own sampling."""

import re

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from helpers import row
from media_files import numbers, picture, write_video
from PIL import Image
from transformers.video_utils import VideoMetadata

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.trunk_media import video_metadata
from trl_vpo.media.load import Clip, VideoOptions, load_video

VIDEO_FAMILIES = [name for name, (_, video) in FAMILIES.items() if video]
ALL = VideoOptions(num_frames=1000)


@pytest.fixture(scope="module")
def processors():
    return {name: build(name)[1] for name in VIDEO_FAMILIES}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """25 fps for 4 s, 30 fps for 2 s, NTSC in two containers, and pictures at 0, 1, 2, 3, 4 and 60 s."""
    folder = tmp_path_factory.mktemp("times")
    write_video(folder / "25.mp4", 100, fps=25)
    write_video(folder / "30.mkv", 61, fps=30)
    write_video(folder / "vfr.mp4", 6, fps=1, times=[0, 1, 2, 3, 4, 60], bframes=0)
    write_video(folder / "vfr.webm", 6, fps=10, times=[0, 3, 7, 8, 31, 90], codec="libvpx-vp9", bframes=0)
    first, *others = [Image.fromarray(picture(i)) for i in range(4)]
    first.save(folder / "vfr.gif", save_all=True, append_images=others, duration=[500, 1500, 1000, 3000])
    return folder


def prompt_of(processor, source, options):
    tree = PreferenceCollator(processor, video=options).encode(row("video", [source]))
    return tree.trunks[0], processor.tokenizer.decode(tree.trunks[0].ids)


def second_per_grid(processor, source, options):
    return prompt_of(processor, source, options)[0].media["second_per_grid_ts"].tolist()


@pytest.mark.parametrize("fps, grids", [(1, 2.0), (2, 1.0), (5, 0.4), (3, 2 / 3)])
def test_qwen25_sampled_by_fps_is_as_the_official_one(processors, clips, fps, grids):
    processor = processors["Qwen2.5-VL"]
    ours = prompt_of(processor, str(clips / "25.mp4"), VideoOptions(fps=fps))[0].media
    clip = load_video(clips / "25.mp4", ALL)  # handed every frame, the processor samples by itself
    whole = VideoMetadata(total_num_frames=clip.total_frames, fps=round(clip.fps), duration=clip.duration)
    text, videos = "<|vision_start|><|video_pad|><|vision_end|>", {"videos": [clip.frames], "video_metadata": [whole]}
    theirs = processor(text=[text], **videos, do_sample_frames=True, return_tensors="pt", fps=fps)
    assert ours["second_per_grid_ts"].tolist() == pytest.approx([grids], abs=1e-7)
    assert ours["second_per_grid_ts"].tolist() == theirs["second_per_grid_ts"].tolist()
    assert (ours["pixel_values_videos"] == theirs["pixel_values_videos"]).all()


def test_qwen25_temporal_positions_are_even(clips):
    model, processor = build("Qwen2.5-VL")
    trunk, _ = prompt_of(processor, str(clips / "25.mp4"), VideoOptions(fps=2))
    types = torch.tensor([trunk.types["mm_token_type_ids"]])
    media = {name: trunk.media[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    positions, _ = model.model.get_rope_index(torch.tensor([trunk.ids]), mm_token_type_ids=types, **media)
    times = positions[0, 0][types[0] == 2].unique()
    assert (times - times[0]).tolist() == [0, 2, 4, 6]  # two position steps a second, a grid step a second


@pytest.mark.parametrize(
    "name, options, grids",
    [
        ("25.mp4", {"num_frames": 8}, 1.0),  # 8 frames over 4 s
        ("25.mp4", {"num_frames": 16}, 0.5),
        ("25.mp4", {"fps": 2, "max_frames": 4}, 2.0),
        ("25.mp4", {"fps": 2, "video_start": 1.0, "video_end": 3.0}, 1.0),
        ("25.mp4", {"fps": 2, "video_end": 3.3}, 1.0),  # seven samples, half a second apart
        ("25.mp4", {"num_frames": 4, "video_start": 2.0}, 1.0),
        ("25.mp4", {"num_frames": 1}, 8.0),
        ("25.mp4", {"fps": 1000, "max_frames": 1000}, 0.08),  # every frame there is
        ("vfr.mp4", {"num_frames": 6}, 2 * 61 / 6),
        ("vfr.mp4", {"num_frames": 6, "video_end": 4.0}, 2.0),
        ("vfr.mp4", {"num_frames": 1, "video_start": 10.0, "video_end": 40.0}, 60.0),
        ("vfr.gif", {"num_frames": 4}, 3.0),
        ("vfr.gif", {"fps": 2, "video_end": 2.0}, 2.0),  # two pictures in two seconds
    ],
)
def test_qwen25_seconds_of_a_grid_step(processors, clips, name, options, grids):
    seconds = second_per_grid(processors["Qwen2.5-VL"], str(clips / name), VideoOptions(**options))
    assert seconds == pytest.approx([grids], rel=1e-6)


VFR = ["00:00", "00:01", "00:02", "00:03", "00:04", "01:00"]
STAMPS = [  # file, options, the seconds that Qwen3-VL prints, the minutes that SmolVLM prints, its duration
    ("25.mp4", {"fps": 2, "max_frames": 4}, [0.5, 3.0], ["00:00", "00:01", "00:02", "00:03"], "0:00:04"),
    ("25.mp4", {"num_frames": 4}, [0.7, 3.3], ["00:00", "00:01", "00:02", "00:03"], "0:00:04"),
    ("25.mp4", {"num_frames": 1}, [2.0], ["00:01"], "0:00:04"),
    ("30.mkv", {"fps": 1}, [0.5, 2.0], ["00:00", "00:01", "00:02"], "0:00:02"),
    ("vfr.mp4", {"num_frames": 6}, [0.5, 2.5, 32.0], VFR, "0:01:01"),
    ("vfr.mp4", {"fps": 1}, [0.5, 2.5, 32.0], VFR, "0:01:01"),
    ("vfr.mp4", {"num_frames": 2, "video_start": 10.0}, [35.0], ["00:10", "01:00"], "0:01:01"),
    ("vfr.mp4", {"num_frames": 4, "video_start": 10.0, "video_end": 40.0}, [10.0], ["00:10"], "0:01:01"),
    ("vfr.webm", {"num_frames": 6}, [0.1, 0.8, 6.0], ["00:00", "00:00", "00:00", "00:00", "00:03", "00:09"], None),
    ("vfr.gif", {"num_frames": 4}, [0.2, 2.5], ["00:00", "00:00", "00:02", "00:03"], "0:00:06"),
]


@pytest.mark.parametrize("name, options, seconds, minutes, duration", STAMPS)
def test_printed_times_are_the_real_ones(processors, clips, name, options, seconds, minutes, duration):
    _, text = prompt_of(processors["Qwen3-VL"], str(clips / name), VideoOptions(**options))
    assert list(map(float, re.findall(r"<(\d+\.\d) seconds>", text))) == seconds
    _, text = prompt_of(processors["SmolVLM"], str(clips / name), VideoOptions(**options))
    assert re.findall(r"Frame from (\d\d:\d\d):", text) == minutes
    assert duration is None or f"{duration} [H:MM:SS]" in text


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("name", ["25.mp4", "vfr.mp4"])
def test_every_family_gets_every_frame(processors, clips, family, name):
    """Those that print no times included: the same frames whatever the rate."""
    processor = processors[family]
    trunk, text = prompt_of(processor, str(clips / name), VideoOptions(num_frames=4))
    key = "pixel_values" if family in ("SmolVLM", "InternVL") else "pixel_values_videos"
    clip = load_video(clips / name, VideoOptions(num_frames=4))
    want = processor.video_processor(videos=[clip.frames], do_sample_frames=False, return_tensors="pt")
    assert trunk.media[key].numel() == want.get(key, want.get("pixel_values_videos")).numel()
    if family == "InternVL":
        assert [f"Frame{i}: <img>" in text for i in (1, 2, 3, 4, 5)] == [True] * 4 + [False]


def test_frames_without_a_clock_count_as_two_a_second(processors):
    frames = [picture(i) for i in range(8)]
    timed, processor = {"video": frames, "frames_fps": 0.3}, processors["Qwen2.5-VL"]
    assert second_per_grid(processor, frames, VideoOptions()) == [1.0]
    assert second_per_grid(processor, timed, VideoOptions()) == pytest.approx([2 / 0.3])
    assert second_per_grid(processor, frames, VideoOptions(fps=4)) == [0.5]
    _, text = prompt_of(processors["Qwen3-VL"], timed, VideoOptions(num_frames=4))
    assert re.findall(r"<(\d+\.\d) seconds>", text) == ["3.3", "20.0"]  # 0, 6.7, 16.7 and 23.3 s


@pytest.mark.parametrize(
    "times, rate",
    [
        (np.arange(100) / 30, 30),
        (np.arange(100) * 1001 / 30000, 30000 / 1001),
        (np.round(np.arange(1000) / 30, 3), 30),  # as Matroska rounds them
        (np.round(np.arange(1000) * 1001 / 24000, 3), 24000 / 1001),
        (np.arange(50) / 12.5, 1000),
        (np.array([0, 0.5, 2.0]), 1000),
        (np.array([0, 1.0, 60.0]), 1),
        (np.array([0, 100.0, 3600.0]), 1),
    ],
)
def test_the_clock_of_the_processors_keeps_every_time(times, rate):
    fps, frames = len(times) / (times[-1] + times[1]), np.zeros((len(times), 8, 8, 3), np.uint8)
    meta = video_metadata(Clip(frames, times, fps, len(times), len(times) / fps, "x"))
    assert meta.fps == pytest.approx(rate, rel=1e-12)
    assert all(type(index) is int for index in meta.frames_indices)
    np.testing.assert_allclose(meta.timestamps, times, atol=1e-3)
    assert meta.sampled_fps == pytest.approx(fps)


def test_a_window_inside_one_long_picture_shows_that_picture(clips):
    for options in ({"num_frames": 3}, {"fps": 1}, {"num_frames": 1}):
        clip = load_video(clips / "vfr.mp4", VideoOptions(video_start=10.0, video_end=40.0, **options))
        assert numbers(clip.frames) == [4] and clip.timestamps.tolist() == [10.0] and clip.span == 30.0
    later = load_video(clips / "vfr.mp4", VideoOptions(num_frames=9, video_start=3.5, video_end=61.0))
    assert numbers(later.frames) == [3, 4, 5] and later.timestamps.tolist() == [3.5, 4.0, 60.0]
    still = load_video([picture(7)], VideoOptions(num_frames=4))
    assert numbers(still.frames) == [7] and still.span == still.duration == 0.5
    within = load_video({"video": [picture(7)], "frames_fps": 0.1, "video_start": 4, "video_end": 5}, ALL)
    assert numbers(within.frames) == [7] and within.timestamps.tolist() == [4.0] and within.span == 1.0
