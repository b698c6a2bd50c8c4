"""Choose which frames of a video are used (`sample_frames`), as `VideoOptions` ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trl_vpo.errors import MediaError

DEFAULT_NUM_FRAMES = 16
_CLOCK = 1e-3  # seconds; containers round the times of frames, Matroska to whole milliseconds


@dataclass(frozen=True)
class VideoOptions:
    """The sampling of a video: which of its frames are used, and how large.

    ``num_frames``: that many, spread evenly from the first to the last frame of the window; 16 when neither this nor
    ``fps`` is given, and an error when both are. ``fps``: that many a second, evenly fewer when there would be more
    than ``max_frames``. ``max_pixels``: larger frames are scaled down to at most so many pixels, aspect kept.
    ``video_start``, ``video_end``: the window in seconds from the first frame; an end beyond the video means its end.
    The frame on the screen when the window begins belongs to it. A wrong value raises ValueError.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int = 64
    max_pixels: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_frames", "max_pixels"):
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not ((whole and value >= 1) or (value is None and name != "max_frames")):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1.")
        for name in ("fps", "video_start", "video_end"):
            value, zero = getattr(self, name), name == "video_start"
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and (value > 0 or (zero and value == 0))):
                raise ValueError(
                    f"{name} is {value!r}: give a number {'at least' if zero else 'above'} 0, or leave it out."
                )
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(
                f"num_frames is {self.num_frames} and fps is {self.fps}: set one, leave the other out (None)."
            )
        if self.video_end is not None and self.video_end <= (self.video_start or 0):
            raise ValueError(
                f"video_end is {self.video_end} s, video_start is {self.video_start or 0} s: the end must come later."
            )
        if self.num_frames is None and self.fps is None:
            object.__setattr__(self, "num_frames", DEFAULT_NUM_FRAMES)


def sample_frames(times: np.ndarray, duration: float, options: VideoOptions, name: str) -> tuple[np.ndarray, float]:
    """Return the numbers (T,) of the frames to use, ascending and distinct, and the seconds that they stand for.

    ``times``: (N,) when each frame is shown, in seconds. ``num_frames``: ``round(linspace(0, n - 1, T))`` over the n
    frames of the window: its first and last frame are among them, as in LLaVA and Qwen; a single frame is the middle
    one. ``fps``: the frames on the screen at start, start + 1/fps, ... before the window's end. The frame on the
    screen at the start is the window's first. Raises :class:`MediaError` for a window behind the end.
    """
    start = options.video_start or 0.0
    if start >= duration:
        raise MediaError(
            f"{name}: video_start is {start} s, but the video ends at {duration:.2f} s: give an earlier start "
            "(seconds, not frames)."
        )
    end = duration if options.video_end is None else min(options.video_end, duration)
    shown_from = times - np.minimum(_CLOCK, 0.4 * np.diff(times, prepend=times[0]))  # less than half an interval
    low = max(0, np.searchsorted(shown_from, start, side="right") - 1)
    low = np.searchsorted(times, times[low])  # the first of several with one time
    high = np.searchsorted(shown_from, end)
    if options.fps is None:
        # The last of several frames counts as long as is usual; one that stays for long, only in the window.
        until = end if high - low == 1 else max(end, times[high - 1] + np.median(np.diff(times)))
        until = min(until, times[high] if high < len(times) else duration)
        return low + _spread(high - low, options.num_frames), float(until - max(times[low], start))
    count = max(1, math.ceil((end - start) * options.fps - _CLOCK))
    moments = start + np.arange(count) / options.fps
    on_screen = np.searchsorted(shown_from, moments, side="right") - 1
    on_screen = np.unique(on_screen.clip(low, high - 1))
    return on_screen[_spread(len(on_screen), options.max_frames)], count / options.fps


def _spread(n: int, count: int) -> np.ndarray:
    """Return ``count`` numbers spread over 0 .. n - 1, or all of them."""
    if count == 1:
        return np.array([(n - 1) // 2])
    return np.linspace(0, n - 1, min(n, count)).round().astype(np.int64)
