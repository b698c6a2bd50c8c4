"""Images and videos from the sources that dataset rows hold: loading, frame sampling, and checks ahead of training.

A video is a path, a ``file://`` URL, bytes, a dict (``datasets.Video(decode=False)``: ``path``/``bytes``; or ``video``
in the place of ``path``; options for this one video may stand beside them), a torchcodec decoder
(``datasets.Video()``), a list of frames (each anything that :func:`load_image` takes), a folder of frames (images in
the order of the numbers in their names), or a uint8 array (T, H, W, 3).

A list or an array has no clock. Its frames are taken to be ``1 / frames_fps`` seconds apart, where ``frames_fps`` is a
key of the dict form ``{"video": [...], "frames_fps": 4}``; without it they count as already sampled: at
``VideoOptions.fps`` when that is set, else at 2 frames a second.

Everything that goes wrong with a file is a :class:`MediaError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media.decode import decode
from trl_vpo.media.frame_cache import FIELDS, Entry
from trl_vpo.media.images import check_image, describe, frame_folder, load_image, read_source, shrink
from trl_vpo.media.video import FrameTable, scan

__all__ = [
    "Clip",
    "MediaError",
    "VideoOptions",
    "check_image",
    "check_video",
    "describe",
    "load_image",
    "load_video",
    "sample_frames",
]

DEFAULT_NUM_FRAMES = 16
LIST_FPS = 2.0
_CLOCK = 1e-3  # seconds; containers round the times of frames, Matroska to whole milliseconds
_BYTES = (bytes, bytearray, memoryview)


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video are used, and how large.

    ``num_frames``: that many, spread evenly from the first to the last frame of the window; 16 when neither this nor
    ``fps`` is given, and an error when both are. ``fps``: that many a second, evenly fewer when there would be more
    than ``max_frames``. ``max_pixels``: larger frames are scaled down to at most so many pixels, aspect kept; none is
    scaled up. ``video_start``, ``video_end``: the window in seconds from the first frame; an end beyond the video
    means its end. The picture on the screen when the window begins belongs to it, and counts from there. A wrong
    value raises ValueError and names the field.
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
            if value is None and name != "max_frames":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1.")
        for name in ("fps", "video_start", "video_end"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (value == 0 and name != "video_start"):
                least = "at least 0" if name == "video_start" else "above 0"
                raise ValueError(f"{name} is {value!r}: give a number {least}, or leave it out.")
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


@dataclass
class Clip:
    """The sampled frames of one video.

    ``frames``: (T, H, W, 3) uint8 RGB, upright. ``timestamps``: (T,) float64 seconds from the first frame of the
    video. Of the whole video: ``fps`` (frames a second on average), ``total_frames``, ``duration`` in seconds.
    ``source``: its name for messages. ``span``: the seconds that the sampled frames stand for, T intervals and not
    T - 1: T / ``fps`` where they were sampled by ``fps``, else the window; None is the whole video.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    fps: float
    total_frames: int
    duration: float
    source: str
    span: float | None = None

    @property
    def sample_fps(self) -> float:
        """The rate at which the frames, shown one after the other, keep their times: T - 1 intervals."""
        if len(self.timestamps) == 1:
            return 1 / self.duration
        return float((len(self.timestamps) - 1) / (self.timestamps[-1] - self.timestamps[0]))


@dataclass
class _Frames:
    """A video that is not a file: ``times`` (N,) seconds of all its frames, and ``read(indices)`` -> (T, H, W, 3)."""

    times: np.ndarray
    duration: float
    read: Callable[[np.ndarray, int | None], np.ndarray]


def load_video(
    source: Any, options: VideoOptions, *, media_root: str | Path | None = None, cache: str | Path | None = None
) -> Clip:
    """The frames of ``source`` that ``options`` ask for. With fewer frames than asked for, all of them, none twice.

    With ``media_root``, relative paths start there and no path may leave it. ``cache``: a folder that keeps the clips
    of video files (see :mod:`trl_vpo.media.frame_cache`). Raises :class:`MediaError`, also for a file that gives fewer
    frames than its index promises.
    """
    name = describe(source)
    source, options, frames_fps = _unpack(source, options, name)
    source = frame_folder(source, media_root) or source
    if _is_file(source):
        data = read_source(source, media_root)
        if cache is None or not isinstance(data, Path):
            return _load_file(data, options, name)
        entry = Entry(cache, data, options)
        stored = entry.read()
        if stored:
            return Clip(**stored, source=name)
        clip = _load_file(data, options, name)
        entry.write({field: getattr(clip, field) for field in FIELDS})
        return clip
    table = _frames_of(source, options, frames_fps, media_root, name)
    wanted, span = sample_frames(table.times, table.duration, options, name)
    return _clip(table, wanted, table.read(wanted, options.max_pixels), options, span, name)


def _load_file(data: Path | bytes, options: VideoOptions, name: str, *, first: bool = False) -> Clip:
    table = scan(data, name)
    wanted, span = sample_frames(table.times, table.duration, options, name)
    frames = decode(data, table, wanted[:1] if first else wanted, name, max_pixels=options.max_pixels)
    if first:
        frames = np.broadcast_to(frames, (len(wanted), *frames.shape[1:]))
    return _clip(table, wanted, frames, options, span, name)


def _clip(
    table: FrameTable | _Frames, wanted: np.ndarray, frames: np.ndarray, options: VideoOptions, span: float, name: str
) -> Clip:
    times, total = np.maximum(table.times[wanted], options.video_start or 0), len(table.times)
    return Clip(frames, times, total / table.duration, total, table.duration, name, span)


def check_video(source: Any, options: VideoOptions, *, media_root: str | Path | None = None) -> Clip:
    """The clip that :func:`load_video` would give, with its first frame in the place of all: only that is decoded.

    Raises :class:`MediaError` for what is wrong with a video as far as that shows: a file that is missing, does not
    open, has no video stream or is cut short, a window without a frame, a first frame that does not decode. Of a list,
    every frame that would be used is read. Damage in the middle of a file is found only by :func:`load_video`.
    """
    name = describe(source)
    source, options, frames_fps = _unpack(source, options, name)
    source = frame_folder(source, media_root) or source
    if _is_file(source):
        return _load_file(read_source(source, media_root), options, name, first=True)
    table = _frames_of(source, options, frames_fps, media_root, name)
    wanted, span = sample_frames(table.times, table.duration, options, name)
    return _clip(table, wanted, table.read(wanted, options.max_pixels), options, span, name)


def sample_frames(times: np.ndarray, duration: float, options: VideoOptions, name: str) -> tuple[np.ndarray, float]:
    """The numbers (T,) of the frames to use, ascending and distinct, and the seconds that they stand for.

    ``times``: (N,) when each frame is shown, in seconds. ``num_frames``: ``round(linspace(0, n - 1, T))`` over the n
    frames of the window - its first and last frame are among them, as in LLaVA and Qwen; a single frame is the middle
    one. ``fps``: the frames on the screen at start, start + 1/fps, ... before the window's end. The frame on the
    screen at the start is the window's first. Raises :class:`MediaError` for a window behind the end.
    """
    _check_start(options, duration, name)
    start = options.video_start or 0.0
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
    shown = np.searchsorted(shown_from, moments, side="right") - 1
    shown = np.unique(shown.clip(low, high - 1))
    return shown[_spread(len(shown), options.max_frames)], count / options.fps


def _spread(n: int, count: int) -> np.ndarray:
    """``count`` numbers spread over 0 .. n - 1, or all of them."""
    if n <= count:
        return np.arange(n)
    if count == 1:
        return np.array([(n - 1) // 2])
    return np.linspace(0, n - 1, count).round().astype(np.int64)


def _check_start(options: VideoOptions, duration: float, name: str) -> None:
    if options.video_start is not None and options.video_start >= duration:
        raise MediaError(
            f"{name}: video_start is {options.video_start} s, but the video ends at {duration:.2f} s: "
            "give an earlier start (seconds, not frames)."
        )


def _is_file(source: Any) -> bool:
    return isinstance(source, (str, Path, *_BYTES))


def _unpack(source: Any, options: VideoOptions, name: str) -> tuple[Any, VideoOptions, float | None]:
    """A dict taken apart: what holds the video, the options with the dict's own put over them, and frames_fps."""
    if not isinstance(source, dict):
        return source, options, None
    given = {key: value for key, value in source.items() if value is not None and key != "type"}
    payload = next((given[key] for key in ("bytes", "path", "video") if key in given), None)
    own = {key: value for key, value in given.items() if key not in ("bytes", "path", "video", "frames_fps")}
    unknown = set(own) - {field.name for field in fields(VideoOptions)}
    if payload is None:
        raise MediaError(f"{name} names no video: give `path` or `bytes`.")
    if unknown:
        valid = ", ".join(["path", "bytes", "video", "frames_fps", *(field.name for field in fields(VideoOptions))])
        raise MediaError(f"{name} comes with the unknown keys {sorted(unknown)}: valid are {valid}.")
    if "fps" in own or "num_frames" in own:  # either one replaces both
        own = {"fps": None, "num_frames": None, **own}
    frames_fps = given.get("frames_fps")
    try:
        options = replace(options, **own)
        if frames_fps is not None and not 0 < float(frames_fps) < math.inf:
            raise ValueError(f"frames_fps is {frames_fps!r}: give a number above 0, or leave it out.")
    except (ValueError, TypeError) as error:
        raise MediaError(f"{name}: {error}") from error
    if isinstance(payload, dict):
        return _unpack({**payload, "frames_fps": frames_fps}, options, name)
    return payload, options, frames_fps


def _frames_of(
    source: Any, options: VideoOptions, frames_fps: float | None, media_root: str | Path | None, name: str
) -> _Frames:
    """A list, an array or a torchcodec decoder as :class:`_Frames`."""
    if hasattr(source, "metadata") and hasattr(source, "get_frames_at"):
        return _from_decoder(source, name)
    if isinstance(source, np.ndarray) and not (
        source.ndim == 4 and source.shape[3] == 3 and source.dtype == np.uint8 and source.size
    ):
        raise MediaError(f"{name} is no video: give a uint8 array of shape (T, H, W, 3) with at least one frame.")
    if not isinstance(source, (np.ndarray, list, tuple)):
        raise MediaError(f"{name} is no video: give a path, bytes, a list of frames or a uint8 array (T, H, W, 3).")
    if not len(source):
        raise MediaError(f"{name} is empty: a list of frames needs at least one.")
    if frames_fps is None and (options.video_start is not None or options.video_end is not None):
        raise MediaError(
            f"{name} has no clock for video_start and video_end: give its `frames_fps`, or leave them out."
        )
    rate = float(frames_fps or options.fps or LIST_FPS)

    def read(indices: np.ndarray, max_pixels: int | None) -> np.ndarray:
        return _read_list(source, indices, max_pixels, media_root, name)

    return _Frames(np.arange(len(source)) / rate, len(source) / rate, read)


def _read_list(
    source: Any, indices: np.ndarray, max_pixels: int | None, media_root: str | Path | None, name: str
) -> np.ndarray:
    pictures: list[np.ndarray] = []
    for index in indices.tolist():
        try:
            picture = np.asarray(load_image(source[index], max_pixels=max_pixels, media_root=media_root))
        except MediaError as error:
            raise MediaError(f"frame {index} of {name}: {error}") from error
        if pictures and picture.shape != pictures[0].shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (pictures[0].shape, picture.shape)]
            raise MediaError(
                f"{name}: frame {index} is {sizes[1]}, frame {indices[0]} is {sizes[0]}: the frames of one video must "
                "have one size, bring them to it first."
            )
        pictures.append(picture)
    return np.stack(pictures)


def _from_decoder(decoder: Any, name: str) -> _Frames:
    """A torchcodec ``VideoDecoder``: it decodes by itself. Its metadata knows only the average rate, by which is
    sampled; the frames come with their real times.
    """
    metadata = decoder.metadata
    total, rate = metadata.num_frames, metadata.average_fps
    if not total or not rate:
        raise MediaError(f"{name} knows neither its frames nor their rate: use datasets.Video(decode=False) instead.")

    def read(indices: np.ndarray, max_pixels: int | None) -> np.ndarray:
        try:
            batch = decoder.get_frames_at(indices.tolist())
        except (RuntimeError, ValueError, IndexError) as error:
            raise MediaError(f"{name} cannot be decoded ({error}): fetch or write the file again.") from error
        if getattr(batch, "pts_seconds", None) is not None:
            times[indices] = np.asarray(batch.pts_seconds) - (getattr(metadata, "begin_stream_seconds", None) or 0)
        frames = np.asarray(batch.data.cpu() if hasattr(batch.data, "cpu") else batch.data)
        if frames.shape[-1] != 3:  # (T, 3, H, W)
            frames = frames.transpose(0, 2, 3, 1)
        return np.stack([np.asarray(shrink(Image.fromarray(frame), max_pixels)) for frame in frames])

    times = np.arange(total) / rate
    return _Frames(times, total / rate, read)


@dataclass(frozen=True)
class Media:
    """The decoded media of one input row."""

    images: tuple[Image.Image, ...] = ()
    videos: tuple[Clip, ...] = ()
