"""Video files that several tests read."""

import pytest
from media_files import write_video


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
