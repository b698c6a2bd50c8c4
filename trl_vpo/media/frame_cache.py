"""Sampled frames of video files, kept on disk: a second epoch, or a second run, reads them instead of decoding.

One file for each video file and way of sampling it, T x H x W x 3 bytes a clip: small `max_pixels` keep the folder
small. It may be shared by workers, ranks and runs, and deleted at any time. What cannot be read back whole is decoded
and written again; where nothing can be written (a full disk), training goes on without.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np

from trl_vpo.files import atomic_write, json_digest
from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.sampling import VideoOptions

FORMAT = 4  # another number, and older entries are no longer found: change it with what decoding or sampling gives
FIELDS = ("frames", "timestamps", "fps", "total_frames", "duration", "span")
_warned = False  # `warnings` would take every clip's for a new one: the error names a file


class Entry:
    """The place of one clip in the cache.

    Its name is a digest of the file's real path, size and time of change, the sampling, the pixel budget, and the
    version of the decoder. A file that changes within the resolution of its time stamp and keeps its size is not
    noticed.
    """

    def __init__(self, folder: str | Path, video: Path, options: VideoOptions, budget: PixelBudget | None = None):
        self._video, self._state = video, _state(video)
        key = [FORMAT, av.__version__, av.library_versions, os.path.realpath(video), self._state, asdict(options)]
        key += [asdict(budget)] if budget else []
        self.path = Path(folder) / f"{json_digest(key, default=lambda number: number.item())}.npz"  # numpy's numbers

    def read(self) -> dict | None:
        """Return the `FIELDS` of the stored clip; None where there is none, or none that is whole."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:  # zip: every member carries its checksum
                clip = {name: stored[name] for name in FIELDS}
            return {name: value if value.ndim else value.item() for name, value in clip.items()}
        except Exception:  # numpy and zipfile raise a dozen kinds on files that are cut short or something else
            return None

    def write(self, clip: dict) -> None:
        """Store the `FIELDS` of a clip, all or nothing: readers see the whole file or none."""
        global _warned
        if _state(self._video) != self._state:
            return  # replaced while it was read: nobody knows which of the two was decoded
        try:
            with atomic_write(self.path) as part, part.open("wb") as file:
                np.savez(file, **clip)
        except OSError as error:
            if not _warned:
                warnings.warn(
                    f"frame_cache: nothing can be written to {self.path.parent} ({error}); clips are decoded without "
                    "it. Free space there, name another folder, or leave frame_cache out.",
                    stacklevel=2,
                )
            _warned = True


def _state(video: Path) -> list[int] | None:
    try:
        stat = video.stat()
    except OSError:  # deleted since: whoever opens it says so
        return None
    return [stat.st_size, stat.st_mtime_ns]
