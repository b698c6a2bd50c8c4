"""Videos and images: sampling and times, sources, and what bad files get. All files are real and written here."""

import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as DatasetsImage
from media_files import (
    cut,
    needs_pyav,
    number,
    numbers,
    overwrite,
    picture,
    remux_shifted,
    set_matrix,
    write_audio_only,
    write_video,
    write_zero_frames,
)
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media import load as media
from trl_vpo.media.decode import decode, decode_once, needed_frames, seeking_pays
from trl_vpo.media.images import fit_pixels
from trl_vpo.media.load import Clip, VideoOptions, check_image, check_video, load_image, load_video
from trl_vpo.media.video import FrameTable, max_threads, open_video, scan

ALL = VideoOptions(num_frames=1000)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """clip.mp4 and its variants: 60 frames, 30 fps, 64x48, keyframes every 12, two B-frames."""
    path = tmp_path_factory.mktemp("media")
    write_video(path / "clip.mp4")
    write_video(path / "fast.mp4", options={"movflags": "faststart"})
    write_video(path / "clip.mkv")
    write_video(path / "clip.avi", codec="mpeg4")
    return path


@pytest.fixture
def clip(folder):
    return folder / "clip.mp4"


# --- sampling and times -------------------------------------------------------------------------------------------


def test_num_frames_are_spread_from_the_first_to_the_last(clip):
    loaded = load_video(clip, VideoOptions(num_frames=5))
    assert isinstance(loaded, Clip)
    assert loaded.frames.shape == (5, 48, 64, 3) and loaded.frames.dtype == np.uint8
    assert numbers(loaded.frames) == [0, 15, 30, 44, 59]
    np.testing.assert_allclose(loaded.timestamps, np.array([0, 15, 30, 44, 59]) / 30)
    assert (loaded.total_frames, loaded.duration, loaded.fps) == (60, pytest.approx(2), pytest.approx(30))
    assert loaded.sample_fps == pytest.approx(4 / (59 / 30))
    assert loaded.source == str(clip)


def test_colours_are_rgb(clip):
    red, green, blue = load_video(clip, VideoOptions(num_frames=1)).frames[0, 44, 30].tolist()
    assert abs(red - 120) < 12 and green < 12 and blue < 12


def test_the_default_is_16_frames(clip):
    assert VideoOptions().num_frames == 16
    assert numbers(load_video(clip, VideoOptions()).frames) == np.linspace(0, 59, 16).round().tolist()


def test_a_short_clip_gives_all_its_frames_and_none_twice(folder):
    path = write_video(folder / "short.mp4", 5)
    assert numbers(load_video(path, VideoOptions(num_frames=16)).frames) == [0, 1, 2, 3, 4]


def test_one_frame_is_the_middle_one(clip):
    assert numbers(load_video(clip, VideoOptions(num_frames=1)).frames) == [29]


@pytest.mark.parametrize(
    "fps, max_frames, expected",
    [
        (5, 64, [0, 6, 12, 18, 24, 30, 36, 42, 48, 54]),
        (0.5, 64, [0]),
        (1000, 64, list(range(60))),  # more than there are: all, none twice
        (5, 4, [0, 18, 36, 54]),
    ],
)
def test_fps_takes_so_many_a_second_up_to_max_frames(clip, fps, max_frames, expected):
    assert numbers(load_video(clip, VideoOptions(fps=fps, max_frames=max_frames)).frames) == expected


def test_times_rounded_to_milliseconds_still_hit_their_frames(folder):
    loaded = load_video(folder / "clip.mkv", VideoOptions(fps=15))  # frame 2 is shown at 0.067 s there, not at 2/30 s
    assert numbers(loaded.frames) == list(range(0, 60, 2))


@pytest.mark.parametrize("fps, name", [(1000, "a.mp4"), (1000, "a.mkv"), (2000, "a.mp4"), (10000, "a.mp4")])
def test_every_frame_of_a_high_speed_camera(tmp_path, fps, name):
    path = write_video(tmp_path / name, 40, fps=fps, bframes=0)
    for options, expected in [
        ({"num_frames": 1000}, list(range(40))),
        ({"num_frames": 4}, [0, 13, 26, 39]),
        ({"fps": fps / 2}, list(range(0, 40, 2))),
        ({"num_frames": 1000, "video_start": 10 / fps, "video_end": 20 / fps}, list(range(10, 21))),
    ]:
        assert numbers(load_video(path, VideoOptions(**options)).frames) == expected


def test_frames_with_one_time_are_all_there(tmp_path):
    """Matroska has whole milliseconds."""
    clip = load_video(write_video(tmp_path / "a.mkv", 40, fps=2000, bframes=0), VideoOptions(num_frames=1000))
    assert numbers(clip.frames) == list(range(40))


def test_a_window_in_seconds(clip):
    window = {"video_start": 0.5, "video_end": 1.0}
    loaded = load_video(clip, VideoOptions(num_frames=4, **window))
    assert numbers(loaded.frames) == [15, 20, 25, 30]
    np.testing.assert_allclose(loaded.timestamps, [0.5, 20 / 30, 25 / 30, 1.0])
    assert loaded.total_frames == 60
    assert numbers(load_video(clip, VideoOptions(fps=10, **window)).frames) == [15, 18, 21, 24, 27]
    assert numbers(load_video(clip, VideoOptions(num_frames=2, video_start=1.5)).frames) == [45, 59]
    assert numbers(load_video(clip, VideoOptions(num_frames=2, video_end=99)).frames) == [0, 59]  # clamped
    assert numbers(load_video(clip, VideoOptions(fps=2, video_end=99)).frames) == [0, 15, 30, 45]


def test_variable_frame_rate_keeps_the_real_times(folder):
    times = [0, 1, 2, 3, 30, 31, 32, 60, 90, 120]
    loaded = load_video(write_video(folder / "vfr.mp4", 10, times=times), ALL)
    np.testing.assert_allclose(loaded.timestamps, np.array(times) / 30, atol=1e-4)
    by_time = load_video(folder / "vfr.mp4", VideoOptions(fps=1))
    assert numbers(by_time.frames) == [0, 4, 7, 8, 9]  # what is on display at 0, 1, 2, 3, 4 s


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_times_start_at_the_first_frame_wherever_the_file_starts(folder, clip, name):
    path = remux_shifted(clip, folder / name, 45)
    loaded = load_video(path, VideoOptions(num_frames=3, video_start=1.0))
    assert numbers(loaded.frames) == [30, 44, 59]
    np.testing.assert_allclose(loaded.timestamps, np.array([30, 44, 59]) / 30, atol=1e-3)
    assert loaded.duration == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("by", [5, 12, 17])
def test_frames_cut_away_by_an_edit_list_are_not_frames(folder, clip, by):
    path = remux_shifted(clip, folder / f"cut{by}.mp4", -by)
    loaded = load_video(path, ALL)
    assert numbers(loaded.frames) == list(range(by, 60))
    assert loaded.timestamps[0] == 0
    assert numbers(load_video(path, VideoOptions(num_frames=2, video_start=1.3)).frames) == [39 + by, 59]


ORIENTATIONS = {  # EXIF: the display matrix that says the same, and what the stored picture is turned by
    1: ((1, 0, 0, 1), None),
    2: ((-1, 0, 0, 1), "FLIP_LEFT_RIGHT"),
    3: ((-1, 0, 0, -1), "ROTATE_180"),
    4: ((1, 0, 0, -1), "FLIP_TOP_BOTTOM"),
    5: ((0, 1, 1, 0), "TRANSPOSE"),
    6: ((0, 1, -1, 0), "ROTATE_270"),
    7: ((0, -1, -1, 0), "TRANSVERSE"),
    8: ((0, -1, 1, 0), "ROTATE_90"),
}


def shown(orientation, pixels):
    turn = ORIENTATIONS[orientation][1]
    image = Image.fromarray(pixels)
    return np.asarray(image.transpose(Image.Transpose[turn]) if turn else image).astype(int)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_video_is_shown_as_its_whole_matrix_says(tmp_path, clip, orientation):
    stored = load_video(clip, VideoOptions(num_frames=3)).frames
    path = tmp_path / "turned.mp4"
    path.write_bytes(clip.read_bytes())
    frames = load_video(set_matrix(path, *ORIENTATIONS[orientation][0]), VideoOptions(num_frames=3)).frames
    assert all((frame == shown(orientation, pixels)).all() for frame, pixels in zip(frames, stored, strict=True))
    small = load_video(path, VideoOptions(num_frames=1, max_pixels=800)).frames
    assert small.shape[1:3] == ((24, 32) if orientation < 5 else (32, 24))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff"])
def test_an_image_is_shown_as_its_exif_says(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    kwargs = {"lossless": True} if name == "x.webp" else {"quality": 95, "subsampling": 0} if name == "x.jpg" else {}
    Image.fromarray(picture(9)).save(tmp_path / name, exif=exif, **kwargs)
    upright = np.asarray(load_image(tmp_path / name)).astype(int)
    want = shown(orientation, picture(9))
    assert upright.shape == want.shape and np.abs(upright - want).mean() < (12 if name == "x.jpg" else 0.001)


def test_max_pixels_scales_down_and_keeps_the_shape(clip):
    small = load_video(clip, VideoOptions(num_frames=3, max_pixels=800))
    assert small.frames.shape == (3, 24, 32, 3)
    assert numbers(small.frames) == [0, 30, 59]
    assert load_video(clip, VideoOptions(num_frames=1, max_pixels=10**6)).frames.shape == (1, 48, 64, 3)


@pytest.mark.parametrize("size", [(64, 48), (1, 5000), (5000, 1), (7, 3), (1921, 1081)])
@pytest.mark.parametrize("limit", [1, 10, 1000, 10**7])
def test_fit_pixels_never_exceeds_its_limit_and_never_enlarges(size, limit):
    width, height = fit_pixels(*size, limit)
    assert 1 <= width <= size[0] and 1 <= height <= size[1] and width * height <= max(limit, 1)
    if limit >= size[0] * size[1]:
        assert (width, height) == size


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gop, bframes, name", [(12, 2, "a.mp4"), (12, 2, "a.mkv"), (9, 0, "b.mp4"), (10, 3, "c.mp4")])
def test_seeking_and_sequential_decoding_give_identical_frames(folder, gop, bframes, name):
    path = write_video(folder / f"gop{gop}{name}", 100, gop=gop, bframes=bframes)
    table = scan(path, name)
    assert table.keyframes.tolist() == list(range(0, 100, gop))
    wanted = np.array([0, 1, 30, 31, 47, 48, 49, 70, 96, 99])
    sought = decode_once(path, table, wanted, name, seek=True)  # no second chance
    assert numbers(sought) == wanted.tolist()
    assert (sought == decode(path, table, wanted, name, seek=False)).all()
    assert (sought == decode(path, table, wanted, name)).all()


BETWEEN = {  # what H.264 does with the frames from which no other is predicted
    "none": "bframes=0",
    "plain": "bframes=3:b-pyramid=none",
    "pyramid": "bframes=3:b-pyramid=normal",
    "open": "bframes=3:open-gop=1",
    "fields": "bframes=3:interlaced=1",
    "refresh": "bframes=3:intra-refresh=1",
    "temporal": "bframes=3:direct=temporal:ref=6:slices=4",
}


@pytest.mark.parametrize("seek", [False, True])
@pytest.mark.parametrize("kind", BETWEEN)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_left_out_change_no_other_frame(folder, container, kind, seek):
    """Its slow twin decodes every frame and picks."""
    path = folder / f"between-{kind}.{container}"
    if not path.exists():
        write_video(path, 100, gop=40, x264=f"scenecut=0:b-adapt=0:{BETWEEN[kind]}")
    table = scan(path, path.name)
    with open_video(path, path.name) as (file, stream):
        every = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert numbers(every) == list(range(100))
    for wanted in ([50], [0, 1, 2, 33, 34, 35, 36, 37, 38, 98, 99], range(0, 100, 7), range(100)):
        assert (decode(path, table, np.array(wanted), path.name, seek=seek) == every[wanted]).all()
    with open_video(path, path.name) as (file, stream):
        decoded = [frame.pts for frame in needed_frames(file, stream, {int(table.pts[50])})]
    assert table.pts[50] in decoded
    assert len(decoded) == 100 if kind == "none" else len(decoded) < 85


@pytest.mark.parametrize("name, bframes", [("a.mp4", 0), ("b.mp4", 3), ("c.mkv", 3), ("shifted.mp4", 2)])
def test_seeking_lands_on_the_keyframe_itself(folder, name, bframes):
    """Not on the one before it, as it does in an mp4 with B-frames that is sought by decoding time."""
    path = write_video(folder / f"land-{name}", 60, bframes=bframes)
    if name == "shifted.mp4":
        path = remux_shifted(path, folder / "land-edited.mp4", -15)
    table = scan(path, name)
    with open_video(path, name) as (container, stream):
        for index, point in reversed(list(zip(table.keyframes, table.seek_points))):
            container.seek(int(point), stream=stream)
            first = next(container.decode(stream))
            assert first.pts == table.pts[index] == max(point, table.pts[0])  # what is cut away is not shown


def test_seeking_reads_only_what_it_needs(folder):
    path = write_video(folder / "long.mp4", 120, gop=12, options={"movflags": "faststart"})
    hurt = overwrite(path, folder / "hurt.mp4", 0.4, 0.6)
    table = scan(hurt, "hurt.mp4")
    wanted = np.array([0, 1, 118])
    assert numbers(decode(hurt, table, wanted, "hurt.mp4", seek=True)) == [0, 1, 118]
    with pytest.raises(MediaError):
        decode(hurt, table, wanted, "hurt.mp4", seek=False)


def test_seeking_pays_with_dense_keyframes_and_late_windows_only():
    def table(gop, n=1800):
        keys = np.arange(0, n, gop)
        return FrameTable(np.arange(n) / 30, n / 30, np.arange(n), keys, keys)

    spread = np.linspace(0, 1799, 16).round().astype(int)
    assert seeking_pays(table(12), spread)
    assert seeking_pays(table(12), spread, threads=4)
    assert not seeking_pays(table(225), spread, threads=2)
    assert not seeking_pays(table(1800), spread)
    assert not seeking_pays(table(12), np.arange(16))
    assert seeking_pays(table(225), np.arange(1700, 1716), threads=4)


@pytest.mark.parametrize(
    "name, codec",
    [
        ("x.avi", "mpeg4"),
        ("x264.avi", "libx264"),
        ("x.ts", "libx264"),
        ("x.h264", "libx264"),
        ("vp8.webm", "libvpx"),
    ],
)
def test_containers_without_usable_packet_times_are_counted_by_decoding(folder, name, codec):
    path = write_video(folder / name, codec=codec, fps=25)
    table = scan(path, name)
    assert table.pts is None and len(table) == 60
    loaded = load_video(path, VideoOptions(num_frames=7))
    assert numbers(loaded.frames) == np.linspace(0, 59, 7).round().tolist()
    np.testing.assert_allclose(loaded.timestamps, np.linspace(0, 59, 7).round() / 25, atol=1e-3)


@pytest.mark.parametrize("name, codec", [("vp9.webm", "libvpx-vp9"), ("part2.mp4", "mpeg4"), ("every.mp4", "libx264")])
def test_other_codecs(folder, name, codec):
    path = write_video(folder / name, 20, codec=codec, gop=1, bframes=0)
    assert numbers(load_video(path, ALL).frames) == list(range(20))


@pytest.mark.parametrize(
    "name, codec", [("v.webm", "libvpx"), ("m.mkv", "mpeg4"), ("j.mov", "mjpeg"), ("g.gif", "gif"), ("m.avi", "mpeg4")]
)
def test_a_last_frame_may_stay_longer(tmp_path, name, codec):
    """Pictures of 0.1 s, the last of 10 s: nothing is missing."""
    if name == "m.avi":
        needs_pyav(17, 0, "the index of frames")
    path = tmp_path / name
    if codec == "gif":
        first, *others = [Image.fromarray(picture(i)) for i in range(10)]
        first.save(path, save_all=True, append_images=others, duration=[100] * 9 + [10_000])
    else:
        write_video(path, 10, fps=10, codec=codec, last=100)
    check_video(path, ALL)
    loaded = load_video(path, ALL)
    assert numbers(loaded.frames) == list(range(10))
    assert loaded.duration == pytest.approx(10.9, abs=0.01)
    np.testing.assert_allclose(loaded.timestamps, np.arange(10) / 10, atol=1e-3)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264"])
def test_an_avi_repeats_pictures_without_storing_them(tmp_path, codec, every):
    """The header counts the repeated ones too."""
    times = [i + i // every for i in range(60)]
    path = write_video(tmp_path / "gaps.avi", codec=codec, times=times)
    check_video(path, ALL)
    loaded = load_video(path, ALL)
    assert numbers(loaded.frames) == list(range(60))
    # packets of libx264 carry the times of decoding, which run up to two pictures behind
    np.testing.assert_allclose(loaded.timestamps, np.array(times) / 30, atol=2.1 / 30 if codec == "libx264" else 1e-6)
    refused(cut(path, tmp_path / "cut.avi", 0.7), "is truncated")


@pytest.mark.parametrize("codec", ["mjpeg", "prores_ks", "mpeg2video", "mpeg4"])
def test_frames_cut_away_from_a_mov_are_not_missing(tmp_path, codec):
    path = write_video(tmp_path / "whole.mov", codec=codec)
    trimmed = remux_shifted(path, tmp_path / "trimmed.mov", -10)
    check_video(trimmed, ALL)
    loaded = load_video(trimmed, ALL)
    assert numbers(loaded.frames) == list(range(10, 60)) and loaded.duration == pytest.approx(50 / 30, abs=0.01)


def test_titles_in_an_unknown_encoding_do_no_harm(folder):
    path = write_video(folder / "title.mp4", 4, metadata={"title": "a plain title"})
    data = path.read_bytes()
    assert b"a plain title" in data
    path.write_bytes(data.replace(b"a plain title", b"\xff plain title"))
    assert numbers(load_video(path, ALL).frames) == [0, 1, 2, 3]


def test_one_decoder_thread_in_a_worker_process(monkeypatch):
    assert max_threads() >= 1
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert max_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no pinning on this system")
def test_one_decoder_thread_in_a_process_pinned_to_one_core():
    cores = os.sched_getaffinity(0)
    assert max_threads() == min(4, len(cores))
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert max_threads() == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_a_longer_sound_track_is_not_taken_for_missing_pictures(folder):
    for name in ("sound.mp4", "sound.mkv"):
        path = write_video(folder / name, 30, audio_seconds=6)
        check_video(path, ALL)
        assert numbers(load_video(path, ALL).frames) == list(range(30))


# --- sources ------------------------------------------------------------------------------------------------------


def test_every_source_of_a_file_gives_the_same_clip(folder, clip, monkeypatch):
    monkeypatch.chdir(folder)
    data = clip.read_bytes()
    options = VideoOptions(num_frames=3)
    expected = load_video(clip, options)
    for source in [
        str(clip),
        "clip.mp4",
        clip.as_uri(),
        data,
        bytearray(data),
        {"path": str(clip), "bytes": None},
        {"path": "gone.mp4", "bytes": data},
        {"type": "video", "video": str(clip), "fps": None},
        {"video": {"path": str(clip), "bytes": None}},
    ]:
        check_video(source, options)
        loaded = load_video(source, options)
        assert (loaded.frames == expected.frames).all()
        assert (loaded.timestamps == expected.timestamps).all()


def test_a_file_url_with_escapes(folder, clip):
    odd = folder / "a b#ü.mp4"
    odd.write_bytes(clip.read_bytes())
    assert "%20" in odd.as_uri()
    assert load_video(odd.as_uri(), ALL).total_frames == 60


def test_options_of_one_video_stand_beside_its_path(clip):
    source = {"path": str(clip), "num_frames": 2, "video_start": 0.5, "video_end": 1.0, "max_pixels": 800}
    loaded = load_video(source, VideoOptions(fps=1))
    assert numbers(loaded.frames) == [15, 30] and loaded.frames.shape[1:3] == (24, 32)
    assert numbers(load_video({"path": str(clip), "fps": 1}, VideoOptions(num_frames=9)).frames) == [0, 30]


@pytest.mark.parametrize(
    "extra, reason",
    [
        ({"nframes": 4}, "unknown keys.*nframes.*valid are"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 4, "fps": 2}, "set one"),
        ({"video_start": 2, "video_end": 1}, "the end must come later"),
        ({"frames_fps": -1}, "frames_fps is -1"),
    ],
)
def test_wrong_options_of_one_video_name_it(clip, extra, reason):
    with pytest.raises(MediaError, match=reason) as caught:
        load_video({"path": str(clip), **extra}, ALL)
    assert "clip.mp4" in str(caught.value)


def frame_files(folder, count=10):
    paths = []
    for i in range(count):
        paths.append(folder / f"frame{i}.png")
        Image.fromarray(picture(i)).save(paths[-1])
    return paths


def test_a_list_of_frames_of_any_kind(folder):
    paths = frame_files(folder, 5)
    mixed = [
        str(paths[0]),
        Image.fromarray(picture(1)),
        paths[2].read_bytes(),
        {"path": str(paths[3]), "bytes": None},
        picture(4),
    ]
    loaded = load_video(mixed, VideoOptions())
    assert numbers(loaded.frames) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(loaded.timestamps, [0, 0.5, 1, 1.5, 2])  # two a second
    check_video(mixed, VideoOptions())


def test_a_longer_list_is_sampled_like_a_file_and_reads_only_those_frames(folder):
    paths = [str(path) for path in frame_files(folder)]
    paths[1] = "never read"
    assert numbers(load_video(paths, VideoOptions(num_frames=4)).frames) == [0, 3, 6, 9]


def test_an_array_is_a_list_of_frames():
    array = np.stack([picture(i) for i in range(9)])
    loaded = load_video(array, VideoOptions(num_frames=3, max_pixels=800))
    assert numbers(loaded.frames) == [0, 4, 8] and loaded.frames.shape == (3, 24, 32, 3)
    assert loaded.total_frames == 9


def test_the_clock_of_a_list():
    array = np.stack([picture(i) for i in range(12)])
    timed = load_video({"video": array, "frames_fps": 4}, VideoOptions(fps=2, video_start=1))
    assert numbers(timed.frames) == [4, 6, 8, 10]
    np.testing.assert_allclose(timed.timestamps, [1, 1.5, 2, 2.5])
    sampled = load_video(array, VideoOptions(fps=3))  # counts as sampled at fps already
    assert numbers(sampled.frames) == list(range(12)) and sampled.duration == pytest.approx(4)
    with pytest.raises(MediaError, match=r"no clock.*frames_fps"):
        load_video(array, VideoOptions(video_start=1))


def test_a_torchcodec_decoder_is_asked_for_its_frames():
    array = np.stack([picture(i) for i in range(20)])

    class Decoder:
        metadata = SimpleNamespace(num_frames=20, average_fps=10.0)

        def get_frames_at(self, indices):
            return SimpleNamespace(data=array[indices].transpose(0, 3, 1, 2))

    loaded = load_video(Decoder(), VideoOptions(num_frames=3, video_start=0.5, max_pixels=800))
    assert numbers(loaded.frames) == [5, 12, 19] and loaded.frames.shape == (3, 24, 32, 3)
    np.testing.assert_allclose(loaded.timestamps, [0.5, 1.2, 1.9])
    check_video(Decoder(), VideoOptions())

    class Uneven(Decoder):
        metadata = SimpleNamespace(num_frames=20, average_fps=10.0, begin_stream_seconds=5.0)

        def get_frames_at(self, indices):
            return SimpleNamespace(data=array[indices], pts_seconds=5 + np.array(indices) ** 2 / 200)

    np.testing.assert_allclose(load_video(Uneven(), VideoOptions(num_frames=3)).timestamps, [0, 0.5, 1.805])
    Decoder.metadata = SimpleNamespace(num_frames=None, average_fps=None)
    with pytest.raises(MediaError, match="decode=False"):
        load_video(Decoder(), VideoOptions())


def test_every_source_of_an_image_gives_the_same_rgb_image(tmp_path):
    pixels = picture(5)
    path = tmp_path / "five.png"
    Image.fromarray(pixels).save(path)
    for source in [path, str(path), path.as_uri(), path.read_bytes(), {"path": str(path), "bytes": None}, pixels]:
        image = load_image(source)
        assert image.mode == "RGB" and (np.asarray(image) == pixels).all()
        check_image(source)
    given = Image.fromarray(pixels)
    assert (np.asarray(load_image(given)) == pixels).all() and load_image(given) is not given
    assert load_image(path, max_pixels=800).size == (32, 24)
    assert load_image(path, max_pixels=10**6).size == (64, 48)


def test_modes_become_rgb_transparency_white_and_exif_upright(tmp_path):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert [load_image(clear).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert load_image(palette).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to view
    Image.fromarray(np.rot90(picture(9))).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "turned.jpg")
    assert upright.size == (64, 48) and number(np.asarray(upright)) == 9


GREYS = np.array([[0, 1], [128, 255]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_greys_of_datasets_stay_what_they_are(dtype):
    """`datasets.Image` stores an array of integers as TIFF with 16 or 32 bits."""
    data = Dataset.from_dict({"image": [GREYS.astype(dtype)]}, features=Features(image=DatasetsImage()))
    stored = data.cast_column("image", DatasetsImage(decode=False))[0]["image"]
    for source in (data[0]["image"], stored):
        assert np.array_equal(np.asarray(load_image(source))[..., 0], GREYS)


@pytest.mark.parametrize("name, dtype", [("i.tif", np.int32), ("i16.tif", np.uint16), ("i16.png", np.uint16)])
def test_wide_greys_keep_their_upper_bits(tmp_path, name, dtype):
    for pixels, want in ((GREYS, GREYS), (GREYS * 257, GREYS), (np.array([[0, 0x8001], [300, 65535]]), None)):
        Image.fromarray(pixels.astype(dtype)).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name))[..., 1].tolist() == (
            [[0, 128], [1, 255]] if want is None else want.tolist()
        )


def test_other_modes_of_grey_and_colour(tmp_path):
    big_endian = Image.frombytes("I;16B", (2, 1), b"\x80\x01\xff\xff")
    assert [load_image(big_endian).getpixel((x, 0))[0] for x in (0, 1)] == [128, 255]
    assert load_image(Image.new("LA", (1, 1), (40, 255))).getpixel((0, 0)) == (40, 40, 40)
    assert load_image(Image.new("LA", (1, 1), (40, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128)).convert("RGBa")
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    red = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    red.save(tmp_path / "red.jpg", quality=100)
    for source in (red, tmp_path / "red.jpg"):
        assert np.allclose(load_image(source).getpixel((0, 0)), (255, 0, 0), atol=3)
    for pixels, reach in ((70000, "0 to 70000"), (-1, "-1 to 0")):
        refused_image(Image.fromarray(np.array([[0, pixels]], np.int32)), f"greys reach from {reach}", name="PIL")


# --- bad input: every message names the file and the way out ---------------------------------------------------------


def refused(source, reason, *, name=None, load=load_video, check=check_video, options=ALL, **kwargs):
    """Loader and check both raise a MediaError that gives the reason, names the file, and survives pickling."""
    for function in filter(None, (load, check)):
        arguments = (source,) if function in (load_image, check_image) else (source, options)
        with pytest.raises(MediaError, match=reason) as caught:
            function(*arguments, **kwargs)
        message = str(caught.value)
        assert (name or str(source)) in message and message.endswith("."), message
        again = type(caught.value)(message)  # as torch's DataLoader raises it in the main process
        assert str(again) == message and str(pickle.loads(pickle.dumps(caught.value))) == message
    return caught.value


def refused_image(source, reason, **kwargs):
    return refused(source, reason, load=load_image, check=check_image, **kwargs)


def test_missing_empty_and_folder(folder, tmp_path):
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for refuse in (refused, refused_image):
        refuse(tmp_path / "none.mp4", "does not exist.*check the path")
        refuse(empty, r"is empty \(0 bytes\).*again")
        refuse(tmp_path, "is a folder")
        refuse(b"", "is empty", name="<bytes, 0 long>")
        refuse({"path": None, "bytes": None}, "give `path` or `bytes`", name="dict")
        refuse("a\0b", "cannot be reached")


def test_garbage_and_text(tmp_path):
    garbage = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    (tmp_path / "garbage.mp4").write_bytes(garbage)
    error = refused(tmp_path / "garbage.mp4", "cannot be opened as a video.*complete")
    assert error.__cause__ is not None
    refused(garbage, "cannot be opened as a video", name="<bytes, 5000 long>")
    for name in ("notes.txt", "notes.mp4"):  # FFmpeg plays .txt files as a terminal
        (tmp_path / name).write_text("Not a video at all. " * 50)
        refused(tmp_path / name, "no video stream|cannot be opened")


def test_truncated_mp4_with_its_index_in_front(folder, tmp_path):
    path = cut(folder / "fast.mp4", tmp_path / "cut.mp4", 0.6)
    refused(path, r"truncated: its mdat box goes on to byte \d+, the file ends at \d+\. Fetch")
    refused(path, "truncated", options=VideoOptions(num_frames=2, video_end=0.3))  # also when the rest is not needed
    refused(path.read_bytes(), "truncated", name="<bytes,")
    short = write_video(tmp_path / "short.mp4", 2, options={"movflags": "faststart"})
    index = short.read_bytes().index(b"mdat") - 4
    path.write_bytes(short.read_bytes()[: int(index * 0.6)])  # what is left of the index names no stream
    refused(path, "truncated: its moov box goes on")


def test_truncated_mp4_with_its_index_behind(clip, tmp_path):
    refused(cut(clip, tmp_path / "cut.mp4", 0.6), "truncated: its mdat box goes on")
    (tmp_path / "no.mp4").write_bytes(clip.read_bytes()[: clip.read_bytes().index(b"moov") - 4])
    refused(tmp_path / "no.mp4", "no moov atom.*cut short")


def test_frames_that_a_header_promises_and_the_file_does_not_hold(tmp_path):
    """The structure is whole: an mkv whose clusters are padding from the third on."""
    for name, sound in (("clip.mkv", 0), ("spoken.mkv", 2)):
        path = write_video(tmp_path / name, audio_seconds=sound)
        data = bytearray(path.read_bytes())
        for at in [found.start() for found in re.finditer(re.escape(b"\x1f\x43\xb6\x75"), data)][2:]:
            length = 6 + int.from_bytes(data[at + 4 : at + 6], "big") - 0x4000
            data[at : at + 9] = b"\xec\x01" + (length - 9).to_bytes(7, "big")
        path.write_bytes(data)
        refused(path, "incomplete: its header promises 2.00 s of video, it holds", check=None)


def test_truncated_matroska_and_avi(folder, tmp_path):
    for name in ("clip.mkv", "clip.avi"):
        for fraction in (0.5, 0.7, 0.99):
            refused(cut(folder / name, tmp_path / name, fraction), r"is truncated: .* the file ends at \d+\. Fetch")
    data = (folder / "clip.avi").read_bytes()
    (tmp_path / "end.avi").write_bytes(data[: data.rindex(b"idx1") - 40])  # in the middle of the last frame
    refused(tmp_path / "end.avi", "is truncated")


def test_a_file_that_gives_fewer_frames_than_its_table_is_an_error(clip, tmp_path):
    table = scan(clip, "clip.mp4")
    shorter = write_video(tmp_path / "shorter.mp4", 30)
    with pytest.raises(MediaError, match=r"breaks off: frame 59 of 60, at 1.97 s.*after 2 of the 3 wanted"):
        decode(shorter, table, np.array([0, 20, 59]), "shorter.mp4")
    slower = write_video(tmp_path / "slower.mp4", 60, times=list(range(0, 120, 2)))
    with pytest.raises(MediaError, match="breaks off: frame 1 of 60"):  # no frame is shown at its time
        decode(slower, table, np.array([0, 1, 59]), "slower.mp4")


def test_corrupt_middle(folder, tmp_path):
    path = overwrite(folder / "fast.mp4", tmp_path / "hurt.mp4", 0.4, 0.8)
    error = refused(path, "cannot be decoded.*damaged", check=None)
    assert error.__cause__ is not None
    check_video(path, ALL)  # damage in the middle shows only in decoding


def test_audio_only_and_zero_frames(tmp_path):
    refused(write_audio_only(tmp_path / "speech.mp4"), r"no video stream \(audio only\).*drop the row")
    refused(write_audio_only(tmp_path / "song.mp4", cover=True), r"no video stream \(audio only\)")
    refused(write_zero_frames(tmp_path / "zero.mp4"), "without a single frame")


def test_a_playlist_cannot_pull_in_other_files(clip, tmp_path):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n")
    refused(tmp_path / "list.mp4", "cannot be opened")
    refused(tmp_path / "list.m3u8", "cannot be opened")
    refused(f"concat:{clip}", "does not exist")


@pytest.mark.parametrize("url", ["http://host/a.mp4", "https://host/a.mp4", "s3://bucket/a.mp4"])
def test_urls_are_not_fetched(url):
    for refuse in (refused, refused_image):
        refuse(url, "nothing is fetched here, download it")
    refused("file://host/a.mp4", "names the host")


def test_a_window_outside_of_the_video(clip):
    refused(clip, "video_start is 2.5 s, but the video ends at 2.00 s", options=VideoOptions(video_start=2.5))


def test_bad_lists_of_frames(folder, tmp_path):
    good = picture(0)
    refused([], "empty.*at least one", name="<list of 0 frames>")
    refused(np.zeros((0, 4, 4, 3), np.uint8), "at least one frame", name="<array (0, 4, 4, 3)")
    refused(np.zeros((2, 3, 4, 4), np.uint8), "shape .T, H, W, 3.", name="<array (2, 3, 4, 4)")
    refused(np.zeros((2, 4, 4, 3)), "uint8", name="float64")
    refused([good, picture(0, 32, 24)], "frame 1 is 32x24, frame 0 is 64x48.*one size", name="list of 2 frames")
    refused([good, str(tmp_path / "gone.png")], "frame 1 of .*does not exist", name="gone.png")
    refused([str(folder / "clip.mp4")], "a video belongs into `videos`", name="clip.mp4")
    refused(7, "is no video", name="<int>")
    refused(Image.fromarray(good), "is no video: give", name="PIL image")


def test_images_that_are_none(tmp_path):
    (tmp_path / "text.png").write_text("no pixels here")
    refused_image(tmp_path / "text.png", "not a readable image.*a picture")
    rng = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in ("whole.png", "whole.jpg"):
        Image.fromarray(rng).save(tmp_path / name)
        short = cut(tmp_path / name, tmp_path / f"short{name}", 0.5)
        assert refused_image(short, "not a readable image.*cut short").__cause__ is not None
        refused_image(short.read_bytes(), "not a readable image", name="<bytes,")
    refused_image(np.zeros((4, 4, 3)), "uint8", name="<array")
    refused_image(np.zeros((3, 8, 8), np.uint8), "uint8 array of shape", name="<array")
    refused_image(7, "is no image", name="<int>")
    floats = Image.fromarray(np.zeros((2, 2), np.float32))
    refused_image(floats, "save it with 8 bits", name="PIL image")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused_image(tmp_path / "bomb.png", "scale it down")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_wants_max_pixels(tmp_path, monkeypatch):
    """The limit is Pillow's own; this is what 169 million pixels are to it, in small."""
    Image.fromarray(picture(0, 130, 130)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8948)
    reason = r"has 130x130 pixels \(0 million\), more than 0 million: set max_pixels, which scales it down"
    refused_image(tmp_path / "huge.png", reason)
    refused_image(Image.fromarray(picture(0, 130, 130)), reason, name="PIL image 130x130")
    refused([str(tmp_path / "huge.png")], reason, name="huge.png")
    assert load_image(tmp_path / "huge.png", max_pixels=1600).size == (40, 40)
    check_image(tmp_path / "huge.png", max_pixels=1600)
    assert load_video([str(tmp_path / "huge.png")], VideoOptions(max_pixels=1600)).frames.shape == (1, 40, 40, 3)
    assert load_image(tmp_path / "huge.png", limit=False).size == (130, 130)


def test_media_root_is_where_relative_paths_start_and_what_no_path_leaves(tmp_path, clip):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    (root / "sub").mkdir(parents=True)
    Image.fromarray(picture(3)).save(outside)
    Image.fromarray(picture(3)).save(root / "sub" / "in.png")
    (root / "clip.mp4").write_bytes(clip.read_bytes())
    (root / "link.png").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "sub" / "in.png")
    (root / "away").symlink_to(tmp_path)

    for inside in ("sub/in.png", "sub/../sub/in.png", str(root / "sub/in.png"), "inner.png"):
        assert number(np.asarray(load_image(inside, media_root=root))) == 3
    assert load_video("clip.mp4", ALL, media_root=str(root)).total_frames == 60
    assert len(load_video(["sub/in.png", "inner.png"], ALL, media_root=root).frames) == 2

    for path in ("../outside.png", str(outside), outside.as_uri(), "link.png", "away/outside.png"):
        name = "outside.png" if "link" not in path else "link.png"
        refused_image(path, "lies outside of media_root", name=name, media_root=root)
        refused(path, "lies outside of media_root", name=name, media_root=root)
        refused([path], "lies outside of media_root", name=name, media_root=root)
        refused({"path": path, "bytes": None}, "lies outside of media_root", name=name, media_root=root)
    refused(str(clip), "lies outside", media_root=root)
    refused_image("in.png", "is not a folder", name="nowhere", media_root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "field, value",
    [
        *[("num_frames", value) for value in (0, -1, 2.5, True, "16")],
        *[("max_frames", value) for value in (0, None)],
        ("max_pixels", 0),
        *[("fps", value) for value in (0, -1, float("nan"), float("inf"), "2")],
        *[("video_start", value) for value in (-1, float("nan"))],
        *[("video_end", value) for value in (0, -1)],
    ],
)
def test_wrong_options_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}: give"):
        VideoOptions(**{field: value})


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="num_frames is 8 and fps is 2: set one"):
        VideoOptions(num_frames=8, fps=2)
    with pytest.raises(ValueError, match="video_end is 1 s, video_start is 2 s"):
        VideoOptions(video_start=2, video_end=1)
    assert VideoOptions(fps=2).num_frames is None


def test_importing_needs_neither_torch_nor_transformers():
    code = (
        "import sys, trl_vpo.media.load, trl_vpo.media.masking; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'trl', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert set(media.__all__) <= set(dir(media))


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for at in (1, 2, 10, 9):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(folder / f"frame{at}.png")
    (folder / "notes.txt").write_text("not a frame")
    clip = load_video("clip", VideoOptions(), media_root=tmp_path)
    assert clip.frames[:, 0, 0, 0].tolist() == [1, 2, 9, 10]
    check_video(folder, VideoOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="empty is a folder without images"):
        load_video(tmp_path / "empty", VideoOptions())
    with pytest.raises(MediaError, match="outside of media_root"):
        load_video("../clip", VideoOptions(), media_root=tmp_path / "empty")


def test_links_to_frames_are_read_in_the_order_of_their_own_names(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "clip").mkdir()
    for at, stored in enumerate("cab"):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(tmp_path / "store" / f"{stored}.png")
        (tmp_path / "clip" / f"{at / 4}.png").symlink_to(tmp_path / "store" / f"{stored}.png")
    assert load_video(tmp_path / "clip", VideoOptions()).frames[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_a_folder_of_frames_named_by_their_seconds(tmp_path):
    for at, second in enumerate(("0", "0.25", "0.5", "1", "1.125", "2", "10", "10.0625")):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(tmp_path / f"{second}.png")
    assert load_video(tmp_path, VideoOptions()).frames[:, 0, 0, 0].tolist() == list(range(8))
    Image.new("RGB", (8, 8), (8, 0, 0)).save(
        tmp_path / "last.png"
    )  # no number: the digits of a name are read one by one
    order = load_video(tmp_path, VideoOptions()).frames[:, 0, 0, 0].tolist()
    assert order == [2, 1, 0, 4, 3, 5, 7, 6, 8]


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_an_empty_path_is_no_folder_of_frames(tmp_path, monkeypatch, blank):
    """It joins to the root itself, with every picture that lies there."""
    frame_files(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    for root in (None, tmp_path):
        for source in (blank, {"path": blank, "bytes": None}, [blank]):
            refused(source, "the path is empty", name=repr(blank), media_root=root)
        refused_image(blank, "the path is empty", name=repr(blank), media_root=root)


def test_the_root_itself_is_no_video(tmp_path, monkeypatch):
    frame_files(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for source in (".", "./", "sub/.."):
        refused(source, "is the folder .* itself, where media paths start", media_root=tmp_path)
        refused(source, "is the folder .* itself, where media paths start")
    refused(tmp_path, "is the folder .* itself", media_root=tmp_path)
    assert len(load_video(tmp_path, VideoOptions()).frames) == 2  # named in full, and no root is set
    refused_image(".", "is a folder, not a file", media_root=tmp_path)
    refused_image("sub/", "is a folder, not a file", name="sub", media_root=tmp_path)
    refused(None, "is no video: give a path", name="NoneType")
    refused_image(None, "is no image: give a path", name="NoneType")


def test_a_slash_behind_a_folder_of_frames(tmp_path):
    (tmp_path / "clip").mkdir()
    frame_files(tmp_path / "clip", 3)
    assert numbers(load_video("clip/", VideoOptions(), media_root=tmp_path).frames) == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".tiff", ".TIF", ".gif", ".jp2", ".ppm"])
def test_frames_of_every_picture_format_count(tmp_path, suffix):
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}{suffix if i == 1 else '.png'}")
    (tmp_path / "._0.png").write_bytes(b"left by a Mac")
    assert numbers(load_video(tmp_path, VideoOptions()).frames) == [0, 1, 2]
