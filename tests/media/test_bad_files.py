"""Files that are missing, damaged, or no videos: each is refused by name, with a remedy."""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from media_files import (
    cut,
    numbers,
    picture,
    refused,
    refused_image,
    write_audio_only,
    write_video,
    write_zero_frames,
)
from PIL import Image

from trl_vpo.media.load import VideoOptions, load_video

ALL = VideoOptions(num_frames=1000)


def test_missing_empty_and_folder(tmp_path):
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


def test_truncated_mp4(folder, clip, tmp_path):
    path = cut(folder / "fast.mp4", tmp_path / "cut.mp4", 0.6)
    refused(path, r"truncated: its mdat box extends to byte \d+, but the file ends at \d+\. Fetch")
    refused(path, "truncated", options=VideoOptions(num_frames=2, video_end=0.3))  # also when the rest is not needed
    refused(path.read_bytes(), "truncated", name="<bytes,")
    short = write_video(tmp_path / "short.mp4", 2, options={"movflags": "faststart"}).read_bytes()
    path.write_bytes(short[: int((short.index(b"mdat") - 4) * 0.6)])  # what is left of the index names no stream
    refused(path, "truncated: its moov box extends")
    refused(cut(clip, tmp_path / "behind.mp4", 0.6), "truncated: its mdat box extends")
    (tmp_path / "no.mp4").write_bytes(clip.read_bytes()[: clip.read_bytes().index(b"moov") - 4])
    refused(tmp_path / "no.mp4", "no moov atom.*cut short")


@pytest.mark.parametrize("name, sound", [("clip.mkv", 0), ("spoken.mkv", 2)])
def test_frames_that_a_header_promises_in_vain(tmp_path, name, sound):
    """The structure is whole: an mkv whose clusters are padding from the third on."""
    path = write_video(tmp_path / name, audio_seconds=sound)
    data = bytearray(path.read_bytes())
    for at in [match.start() for match in re.finditer(re.escape(b"\x1f\x43\xb6\x75"), data)][2:]:
        length = 6 + int.from_bytes(data[at + 4 : at + 6], "big") - 0x4000
        data[at : at + 9] = b"\xec\x01" + (length - 9).to_bytes(7, "big")
    path.write_bytes(data)
    refused(path, "incomplete: its header promises 2.00 s of video, it holds", uses=[load_video])


def test_audio_only_and_zero_frames(tmp_path):
    refused(write_audio_only(tmp_path / "speech.mp4"), r"no video stream \(audio only\).*drop the row")
    refused(write_audio_only(tmp_path / "song.mp4", cover=True), r"no video stream \(audio only\)")
    refused(write_zero_frames(tmp_path / "zero.mp4"), "without a single frame")


def test_pictures_without_a_decoder_are_named(tmp_path):
    """A mov whose codec FFmpeg does not know."""
    path = write_video(tmp_path / "odd.mov", 4, codec="prores_ks")
    assert b"apch" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"apch", b"zzzz"))
    refused(path, r"odd\.mov has pictures in a format that FFmpeg cannot decode.*convert it")


@pytest.mark.parametrize("place", ["decode._to_rgb", "video._table_from_packets", "video.find_truncation"])
def test_any_other_error_names_the_file(clip, monkeypatch, place):
    def fail(*args):
        raise OverflowError("a number that is too large")

    monkeypatch.setattr(f"trl_vpo.media.{place}", fail)
    refused(clip, r"cannot be decoded \(OverflowError\('a number that is too large'\)\): convert it")


def test_an_image_of_an_unknown_kind_is_named(tmp_path):
    """Pillow raises NotImplementedError for it."""
    path = tmp_path / "texture.dds"
    Image.fromarray(picture(0)).save(path)
    data = bytearray(path.read_bytes())
    data[80:84] = (0x8000).to_bytes(4, "little")  # the flags of its pixels
    path.write_bytes(data)
    refused_image(path, "is not a readable image")


def test_an_animated_webp_is_not_called_damaged(tmp_path):
    """Animations of other kinds are videos."""
    first, *others = [Image.fromarray(picture(i)) for i in range(4)]
    for name in ("a.webp", "a.png", "a.gif"):
        first.save(tmp_path / name, save_all=True, append_images=others, duration=100)
    path = tmp_path / "a.webp"
    reason = r"is an animated WebP, which FFmpeg does not decode: convert it to an animated PNG"
    refused(path, reason)
    refused(path.read_bytes(), reason, name="<bytes,")
    Image.open(path).save(tmp_path / "clip.png", save_all=True)  # as the message says
    for name in ("clip.png", "a.png", "a.gif"):
        loaded = load_video(tmp_path / name, ALL)
        assert numbers(loaded.frames) == [0, 1, 2, 3] and loaded.duration == pytest.approx(0.4, abs=0.05)
    first.save(path)  # a picture is a video of one frame
    assert numbers(load_video(path, ALL).frames) == [0]


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


@pytest.fixture
def forbidden(clip):
    """A folder of files that this user may not read, root included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "clip.mp4").write_bytes(clip.read_bytes())
        Image.fromarray(picture(0)).save(folder / "image.png")
        for path in folder.iterdir():
            path.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)


def test_a_file_without_permission_is_not_called_damaged(forbidden):
    reason = r"cannot be read .*Permission denied.*check its permissions"
    for error in (refused(forbidden / "clip.mp4", reason), refused_image(forbidden / "image.png", reason)):
        assert "damaged" not in str(error)
