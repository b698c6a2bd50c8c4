"""The frames that are chosen, and their times. All files are real."""

import numpy as np
import pytest
from media_files import numbers, remux_shifted, write_video

from trl_vpo.media.load import Clip, VideoOptions, load_video

ALL = VideoOptions(num_frames=1000)


def test_a_clip_and_its_times(clip):
    loaded = load_video(clip, VideoOptions(num_frames=5))
    assert isinstance(loaded, Clip)
    assert loaded.frames.shape == (5, 48, 64, 3) and loaded.frames.dtype == np.uint8
    assert numbers(loaded.frames) == [0, 15, 30, 44, 59]
    np.testing.assert_allclose(loaded.timestamps, np.array([0, 15, 30, 44, 59]) / 30)
    assert (loaded.total_frames, loaded.duration, loaded.fps) == (60, pytest.approx(2), pytest.approx(30))
    assert loaded.sample_fps == pytest.approx(4 / (59 / 30))
    assert loaded.source == str(clip)
    red, green, blue = loaded.frames[0, 44, 30].tolist()
    assert abs(red - 120) < 12 and green < 12 and blue < 12


WINDOW = {"video_start": 0.5, "video_end": 1.0}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, np.linspace(0, 59, 16).round().tolist()),  # the default
        ({"num_frames": 1}, [29]),  # the middle one
        ({"num_frames": 100}, list(range(60))),  # all, none twice
        ({"fps": 5}, [0, 6, 12, 18, 24, 30, 36, 42, 48, 54]),
        ({"fps": 0.5}, [0]),
        ({"fps": 1000}, list(range(60))),
        ({"fps": 5, "max_frames": 4}, [0, 18, 36, 54]),
        ({"num_frames": 4, **WINDOW}, [15, 20, 25, 30]),
        ({"fps": 10, **WINDOW}, [15, 18, 21, 24, 27]),
        ({"num_frames": 2, "video_start": 1.5}, [45, 59]),
        ({"num_frames": 2, "video_end": 99}, [0, 59]),  # clamped
        ({"fps": 2, "video_end": 99}, [0, 15, 30, 45]),
    ],
)
def test_the_frames_of_each_way_of_sampling(clip, options, expected):
    loaded = load_video(clip, VideoOptions(**options))
    assert numbers(loaded.frames) == expected and loaded.total_frames == 60
    np.testing.assert_allclose(loaded.timestamps, np.array(expected) / 30)


def test_times_rounded_to_milliseconds_hit_their_frames(folder):
    loaded = load_video(folder / "clip.mkv", VideoOptions(fps=15))  # frame 2 is shown at 0.067 s there, not at 2/30 s
    assert numbers(loaded.frames) == list(range(0, 60, 2))


@pytest.mark.parametrize("fps, name", [(1000, "a.mp4"), (1000, "a.mkv"), (2000, "a.mkv"), (10000, "a.mp4")])
def test_every_frame_of_a_high_speed_camera(tmp_path, fps, name):
    path = write_video(tmp_path / name, 40, fps=fps, bframes=0)
    assert numbers(load_video(path, ALL).frames) == list(range(40))
    if fps > 1000 and name == "a.mkv":
        return  # Matroska has whole milliseconds: two frames have one time
    for options, expected in [
        ({"num_frames": 4}, [0, 13, 26, 39]),
        ({"fps": fps / 2}, list(range(0, 40, 2))),
        ({"num_frames": 1000, "video_start": 10 / fps, "video_end": 20 / fps}, list(range(10, 21))),
    ]:
        assert numbers(load_video(path, VideoOptions(**options)).frames) == expected


def test_variable_frame_rate_keeps_the_real_times(tmp_path):
    times = [0, 1, 2, 3, 30, 31, 32, 60, 90, 120]
    path = write_video(tmp_path / "vfr.mp4", 10, times=times)
    np.testing.assert_allclose(load_video(path, ALL).timestamps, np.array(times) / 30, atol=1e-4)
    by_time = load_video(path, VideoOptions(fps=1))
    assert numbers(by_time.frames) == [0, 4, 7, 8, 9]  # what is on display at 0, 1, 2, 3, 4 s


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_times_start_at_the_first_frame(tmp_path, clip, name):
    path = remux_shifted(clip, tmp_path / name, 45)
    loaded = load_video(path, VideoOptions(num_frames=3, video_start=1.0))
    assert numbers(loaded.frames) == [30, 44, 59]
    np.testing.assert_allclose(loaded.timestamps, np.array([30, 44, 59]) / 30, atol=1e-3)
    assert loaded.duration == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("by", [5, 12, 17])
def test_frames_cut_away_by_an_edit_list_are_not_frames(tmp_path, clip, by):
    path = remux_shifted(clip, tmp_path / f"cut{by}.mp4", -by)
    loaded = load_video(path, ALL)
    assert numbers(loaded.frames) == list(range(by, 60))
    assert loaded.timestamps[0] == 0
    assert numbers(load_video(path, VideoOptions(num_frames=2, video_start=1.3)).frames) == [39 + by, 59]


@pytest.mark.parametrize(
    "field, values",
    [
        ("num_frames", (0, -1, 2.5, True, "16")),
        ("max_frames", (0, None)),
        ("max_pixels", (0,)),
        ("fps", (0, -1, float("nan"), float("inf"), "2")),
        ("video_start", (-1, float("nan"))),
        ("video_end", (0, -1)),
    ],
)
def test_wrong_options_are_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{field} is {value!r}: give"):
            VideoOptions(**{field: value})


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="num_frames is 8 and fps is 2: set one"):
        VideoOptions(num_frames=8, fps=2)
    with pytest.raises(ValueError, match="video_end is 1 s, video_start is 2 s"):
        VideoOptions(video_start=2, video_end=1)
    assert VideoOptions(fps=2).num_frames is None
