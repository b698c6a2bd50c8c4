"""Sources of videos: files, lists and folders of frames, arrays, decoders, and the root that no path leaves."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from media_files import frame_files, number, numbers, picture, refused, refused_image
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media.load import VideoOptions, check_video, load_image, load_video

ALL = VideoOptions(num_frames=1000)


def test_every_source_of_a_file_gives_the_same_clip(folder, clip, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    data, options = clip.read_bytes(), VideoOptions(num_frames=3)
    odd = tmp_path / "a b#ü.mp4"
    odd.write_bytes(data)
    assert "%20" in odd.as_uri()
    expected = load_video(clip, options)
    stored = {"path": str(clip), "bytes": None}
    sources = [str(clip), "clip.mp4", clip.as_uri(), odd.as_uri(), data, bytearray(data), stored, {"video": stored}]
    sources += [{"path": "gone.mp4", "bytes": data}, {"type": "video", "video": str(clip), "fps": None}]
    for source in sources:
        check_video(source, options)
        loaded = load_video(source, options)
        assert (loaded.frames == expected.frames).all()
        assert (loaded.timestamps == expected.timestamps).all()


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
        ({"video_start": 2.5}, "video_start is 2.5 s, but the video ends at 2.00 s"),
        ({"frames_fps": -1}, "frames_fps is -1"),
    ],
)
def test_wrong_options_of_one_video_name_it(clip, extra, reason):
    refused({"path": str(clip), **extra}, reason, name="clip.mp4")


def test_a_list_of_frames_of_any_kind(tmp_path):
    paths = frame_files(tmp_path, 5)
    dictionary = {"path": str(paths[3]), "bytes": None}
    mixed = [str(paths[0]), Image.fromarray(picture(1)), paths[2].read_bytes(), dictionary, picture(4)]
    loaded = load_video(mixed, VideoOptions())
    assert numbers(loaded.frames) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(loaded.timestamps, [0, 0.5, 1, 1.5, 2])  # two a second
    check_video(mixed, VideoOptions())
    mixed[1] = "never read"
    assert numbers(load_video(mixed, VideoOptions(num_frames=3)).frames) == [0, 2, 4]


def test_an_array_is_a_list_of_frames_and_may_have_a_clock():
    array = np.stack([picture(i) for i in range(12)])
    loaded = load_video(array[:9], VideoOptions(num_frames=3, max_pixels=800))
    assert numbers(loaded.frames) == [0, 4, 8] and loaded.frames.shape == (3, 24, 32, 3)
    assert loaded.total_frames == 9
    timed = load_video({"video": array, "frames_fps": 4}, VideoOptions(fps=2, video_start=1))
    assert numbers(timed.frames) == [4, 6, 8, 10]
    np.testing.assert_allclose(timed.timestamps, [1, 1.5, 2, 2.5])
    sampled = load_video(array, VideoOptions(fps=3))  # counts as sampled at fps already
    assert numbers(sampled.frames) == list(range(12)) and sampled.duration == pytest.approx(4)
    with pytest.raises(MediaError, match=r"no clock.*frames_fps"):
        load_video(array, VideoOptions(video_start=1))


def test_bad_lists_of_frames(folder, tmp_path):
    good = picture(0)
    for source in ([], np.zeros((0, 4, 4, 3), np.uint8)):
        refused(source, "is empty: a video needs at least one frame", name="<")
    for source in (np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3)), 7, None, Image.fromarray(good)):
        refused(source, "is not a video: give a path.* uint8 array .T, H, W, 3.", name="<")
    refused(SimpleNamespace(get_frames_at=None), r"cast its column to datasets\.Video\(decode=False\)", name="<")
    refused([good, picture(0, 32, 24)], "frame 1 is 32x24, frame 0 is 64x48.*one size", name="list of 2 frames")
    refused([good, str(tmp_path / "gone.png")], "frame 1 of .*does not exist", name="gone.png")
    refused([str(folder / "clip.mp4")], "put a video into `videos`", name="clip.mp4")


def reds(folder, **more):
    """The red of frames of one colour, in order."""
    return load_video(folder, VideoOptions(), **more).frames[:, 0, 0, 0].tolist()


def save_reds(folder, *names):
    folder.mkdir(exist_ok=True)
    for at, name in enumerate(names):
        Image.new("RGB", (8, 8), (at, 0, 0)).save(folder / name)


def test_a_folder_of_frames_is_read_in_the_order_of_numbers(tmp_path):
    save_reds(tmp_path / "clip", "frame1.png", "frame10.png", "frame9.png", "frame2.png")
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    assert reds("clip", media_root=tmp_path) == reds("clip/", media_root=tmp_path) == [0, 3, 2, 1]
    check_video(tmp_path / "clip", VideoOptions())
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty is a folder without images")
    refused("../clip", "outside of media_root", media_root=tmp_path / "empty")


def test_links_to_frames_have_the_order_of_their_own_names(tmp_path):
    save_reds(tmp_path / "store", "c.png", "a.png", "b.png")
    (tmp_path / "clip").mkdir()
    for at, stored in enumerate("cab"):
        (tmp_path / "clip" / f"{at / 4}.png").symlink_to(tmp_path / "store" / f"{stored}.png")
    assert reds(tmp_path / "clip") == [0, 1, 2]


def test_a_folder_of_frames_named_by_their_seconds(tmp_path):
    names = [f"{second}.png" for second in ("0", "0.25", "0.5", "1", "1.125", "2", "10", "10.0625")]
    save_reds(tmp_path, *names)
    assert reds(tmp_path) == list(range(8))
    save_reds(tmp_path, *names, "last.png")  # no number: the digits of a name are read one by one
    assert reds(tmp_path) == [2, 1, 0, 4, 3, 5, 7, 6, 8]


@pytest.mark.parametrize("suffix", [".tiff", ".TIF", ".gif", ".jp2", ".ppm"])
def test_frames_of_every_picture_format_count(tmp_path, suffix):
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}{suffix if i == 1 else '.png'}")
    (tmp_path / "._0.png").write_bytes(b"left by a Mac")
    assert numbers(load_video(tmp_path, VideoOptions()).frames) == [0, 1, 2]


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


def test_paths_start_at_media_root_and_do_not_leave_it(tmp_path, clip):
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
        for source in (path, [path], {"path": path, "bytes": None}):
            refused(source, "lies outside of media_root", name=name, media_root=root)
    refused_image("in.png", "is not a folder", name="nowhere", media_root=tmp_path / "nowhere")
    refused_image("root/a.png", "must not repeat", name="root/a.png", media_root=root)
    refused_image("root/a.png", "the working directory; set media_root", name="root/a.png")


def test_importing_needs_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "trl", "datasets")
    code = f"import sys, trl_vpo.media.load, trl_vpo.media.masking; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
