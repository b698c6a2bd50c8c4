"""Decoding: by seeking or from the start, in every kind of container, upright and scaled."""

import gc
import multiprocessing
import os

import av
import numpy as np
import pytest
from helpers import write_clip
from media_files import (
    ORIENTATIONS,
    cut,
    needs_pyav,
    numbers,
    overwrite,
    picture,
    refused,
    remux_shifted,
    set_matrix,
    upright,
    write_mjpeg,
    write_video,
)
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media.decode import decode, needed_frames, seeking_pays
from trl_vpo.media.images import fit_pixels
from trl_vpo.media.load import VideoOptions, check_video, load_video
from trl_vpo.media.video import FrameTable, max_threads, open_video, scan

ALL = VideoOptions(num_frames=1000)


BETWEEN = {  # what H.264 does with the frames from which no other is predicted
    "none": "bframes=0",
    "plain": "bframes=3:b-pyramid=none",
    "pyramid": "bframes=3:b-pyramid=normal",
    "open": "bframes=3:open-gop=1",
    "fields": "bframes=3:interlaced=1",
    "refresh": "bframes=3:intra-refresh=1",
    "temporal": "bframes=3:direct=temporal:ref=6:slices=4",
}


@pytest.mark.parametrize("kind", BETWEEN)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_left_out_change_no_other_frame(tmp_path, container, kind):
    """Its slow twin decodes every frame and picks."""
    path = tmp_path / f"{kind}.{container}"
    write_video(path, 100, gop=40, x264=f"scenecut=0:b-adapt=0:{BETWEEN[kind]}")
    table = scan(path, path.name)
    with open_video(path, path.name) as (file, stream):
        every = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert numbers(every) == list(range(100))
    for indices in ([50], [0, 1, 2, 33, 34, 35, 36, 37, 38, 98, 99], range(0, 100, 7), range(100)):
        for seek in (False, True):
            assert (decode(path, table, np.array(indices), path.name, seek=seek) == every[indices]).all()
    with open_video(path, path.name) as (file, stream):
        decoded = [frame.pts for frame in needed_frames(file, stream, {int(table.pts[50])})]
    assert table.pts[50] in decoded
    assert len(decoded) == 100 if kind == "none" else len(decoded) < 85


@pytest.mark.parametrize("name, bframes", [("a.mp4", 0), ("b.mp4", 3), ("c.mkv", 3), ("shifted.mp4", 2)])
def test_seeking_lands_on_the_keyframe_itself(tmp_path, name, bframes):
    """Not on the one before it, as it does in an mp4 with B-frames that is sought by decoding time."""
    path = write_video(tmp_path / name, 60, bframes=bframes)
    if name == "shifted.mp4":
        path = remux_shifted(path, tmp_path / "edited.mp4", -15)
    table = scan(path, name)
    assert name == "shifted.mp4" or table.keyframes.tolist() == [0, 12, 24, 36, 48]
    with open_video(path, name) as (container, stream):
        for index, point in reversed(list(zip(table.keyframes, table.seek_points))):
            container.seek(int(point), stream=stream)
            first = next(container.decode(stream))
            assert first.pts == table.pts[index] == max(point, table.pts[0])  # what is cut away is not shown


def test_seeking_reads_only_what_it_needs(tmp_path):
    path = write_video(tmp_path / "long.mp4", 120, gop=12, options={"movflags": "faststart"})
    hurt = overwrite(path, tmp_path / "hurt.mp4", 0.4, 0.6)
    table, indices = scan(hurt, "hurt.mp4"), np.array([0, 1, 118])
    assert numbers(decode(hurt, table, indices, "hurt.mp4", seek=True)) == [0, 1, 118]
    with pytest.raises(MediaError):
        decode(hurt, table, indices, "hurt.mp4", seek=False)


def test_seeking_pays_with_dense_keyframes_and_late_windows():
    def pays(gop, indices, threads=1, n=1800):
        keys = np.arange(0, n, gop)
        return seeking_pays(FrameTable(np.arange(n) / 30, n / 30, np.arange(n), keys, keys), indices, threads)

    spread = np.linspace(0, 1799, 16).round().astype(int)
    assert pays(12, spread) and pays(12, spread, threads=4)
    assert not pays(225, spread, threads=2) and not pays(1800, spread) and not pays(12, np.arange(16))
    assert pays(225, np.arange(1700, 1716), threads=4)


def test_a_file_with_fewer_frames_than_its_table(clip, tmp_path):
    table = scan(clip, "clip.mp4")
    shorter = write_video(tmp_path / "shorter.mp4", 30)
    with pytest.raises(MediaError, match=r"breaks off: frame 59 of 60, at 1.97 s.*after 2 of the 3 wanted"):
        decode(shorter, table, np.array([0, 20, 59]), "shorter.mp4")
    slower = write_video(tmp_path / "slower.mp4", 60, times=list(range(0, 120, 2)))
    with pytest.raises(MediaError, match="breaks off: frame 1 of 60"):  # no frame is shown at its time
        decode(slower, table, np.array([0, 1, 59]), "slower.mp4")


def test_one_decoder_thread_in_a_worker_process(monkeypatch):
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        assert max_threads() == min(4, len(cores))
        os.sched_setaffinity(0, {min(cores)})
        try:
            assert max_threads() == 1  # pinned to one core
        finally:
            os.sched_setaffinity(0, cores)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert max_threads() == 1


def test_a_worker_leaves_its_parents_decoders_alone(tmp_path):
    """Freeing them joins threads that a fork does not have: a worker's garbage collection never came back."""
    with av.open(write_clip(tmp_path / "a.mp4", size=(640, 360))) as container:
        container.streams.video[0].thread_type = "AUTO"
        frames = list(container.decode(video=0))
    pictures = [frame.to_ndarray(format="rgb24", width=320, height=180) for frame in frames]
    assert pictures[0].shape == (180, 320, 3)
    frames.append(frames)  # as a traceback keeps the frame that it is about
    del frames
    worker = multiprocessing.get_context("fork").Process(target=gc.collect, daemon=True)
    worker.start()
    worker.join(20)
    code = worker.exitcode
    worker.kill()
    assert code == 0


COUNTED = [("x.avi", "mpeg4"), ("x.avi", "libx264"), ("x.ts", "libx264"), ("x.h264", "libx264"), ("v.webm", "libvpx")]


@pytest.mark.parametrize("name, codec", COUNTED)
def test_frames_without_usable_packet_times_are_counted(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec=codec, fps=25)
    table = scan(path, name)
    assert table.pts is None and len(table) == 60
    loaded = load_video(path, VideoOptions(num_frames=7))
    assert numbers(loaded.frames) == np.linspace(0, 59, 7).round().tolist()
    np.testing.assert_allclose(loaded.timestamps, np.linspace(0, 59, 7).round() / 25, atol=1e-3)


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


def test_titles_in_an_unknown_encoding_do_no_harm(tmp_path):
    path = write_video(tmp_path / "title.mp4", 4, metadata={"title": "a plain title"})
    data = path.read_bytes()
    assert b"a plain title" in data
    path.write_bytes(data.replace(b"a plain title", b"\xff plain title"))
    assert numbers(load_video(path, ALL).frames) == [0, 1, 2, 3]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_video_is_shown_as_its_whole_matrix_says(tmp_path, clip, orientation):
    stored = load_video(clip, VideoOptions(num_frames=3)).frames
    path = tmp_path / "turned.mp4"
    path.write_bytes(clip.read_bytes())
    frames = load_video(set_matrix(path, *ORIENTATIONS[orientation][0]), VideoOptions(num_frames=3)).frames
    assert all((frame == upright(orientation, pixels)).all() for frame, pixels in zip(frames, stored, strict=True))
    small = load_video(path, VideoOptions(num_frames=1, max_pixels=800)).frames
    assert small.shape[1:3] == ((24, 32) if orientation < 5 else (32, 24))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_with_exif_are_decoded_upright(tmp_path, orientation):
    """FFmpeg hands on the EXIF as side data that PyAV does not know, and a display matrix for its orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = tmp_path / "photo.jpg"
    Image.fromarray(picture(9)).save(photo, exif=exif, quality=95, subsampling=0)
    for path in (photo, write_mjpeg(tmp_path / "camera.mkv", photo.read_bytes(), 3)):
        frames = load_video(path, ALL).frames.astype(int)
        want = upright(orientation, picture(9))
        assert frames.shape[1:] == want.shape and np.abs(frames - want).mean() < 12
        assert len(frames) == (1 if path == photo else 3)


@pytest.mark.parametrize("size", [(64, 48), (1, 5000), (5000, 1), (7, 3), (1921, 1081)])
@pytest.mark.parametrize("limit", [1, 10, 1000, 10**7])
def test_fit_pixels_keeps_its_limit_and_never_enlarges(size, limit):
    width, height = fit_pixels(*size, limit)
    assert 1 <= width <= size[0] and 1 <= height <= size[1] and width * height <= max(limit, 1)
    if limit >= size[0] * size[1]:
        assert (width, height) == size
