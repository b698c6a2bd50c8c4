"""Videos from the sources that dataset rows hold: loaded for training, and checked ahead of it.

A video is a path, a ``file://`` URL, bytes, a dict (``datasets.Video(decode=False)``: ``path``/``bytes``; or ``video``
in the place of ``path``; options for this one video may stand beside them), a list of frames (each anything that
:func:`load_image` takes), a folder of frames (images in the order of the numbers in their names), or a uint8 array
(T, H, W, 3).

A list or an array has no clock. Its frames are taken to be ``1 / frames_fps`` seconds apart, where ``frames_fps`` is a
key of the dict form ``{"video": [...], "frames_fps": 4}``; without it they count as already sampled: at
``VideoOptions.fps`` when that is set, else at 2 frames a second.

Everything that goes wrong with a file is a :class:`MediaError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media.budget import PixelBudget
from trl_vpo.media.decode import Fit, decode
from trl_vpo.media.frame_cache import FIELDS, Entry
from trl_vpo.media.images import BYTES, describe, fit_pixels, frame_folder, load_image, read_source, resized
from trl_vpo.media.sampling import VideoOptions, sample_frames
from trl_vpo.media.video import scan

LIST_FPS = 2.0
_FILE = (str, Path, *BYTES)
_PAYLOAD = ("bytes", "path", "video")  # keys of a dict that hold the video, the first given one wins


@dataclass
class Clip:
    """The sampled frames of one video.

    ``frames``: (T, H, W, 3) uint8 RGB, upright. ``timestamps``: (T,) float64 seconds from the first frame of the
    video. Of the whole video: ``fps`` (frames a second on average), ``total_frames``, ``duration`` in seconds.
    ``source``: its name for messages. ``span``: the seconds that the sampled frames stand for, T intervals and not
    T - 1: T / ``fps`` where they were sampled by ``fps``, else the window; None is the whole video. ``budget``: what
    the frames have their size by; None: they still have to be resized for the model.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    fps: float
    total_frames: int
    duration: float
    source: str
    span: float | None = None
    budget: PixelBudget | None = None

    def sized(self, budget: PixelBudget | None) -> Clip:
        """Return the clip with frames in their size for the model; without a budget that is left to its processor."""
        if budget is None or self.budget == budget:
            return self
        size = budget.size(self.frames.shape[2], self.frames.shape[1], frames=len(self.frames))
        frames = np.stack([np.asarray(resized(Image.fromarray(frame), size)) for frame in self.frames])
        return replace(self, frames=frames, budget=budget)

    @property
    def sample_fps(self) -> float:
        """The rate at which the frames, shown one after the other, keep their times: T - 1 intervals."""
        if len(self.timestamps) == 1:
            return 1 / self.duration
        return float((len(self.timestamps) - 1) / (self.timestamps[-1] - self.timestamps[0]))


@dataclass(frozen=True)
class Media:
    """The decoded media of one input row."""

    images: tuple[Image.Image, ...] = ()
    videos: tuple[Clip, ...] = ()


@dataclass
class _Frames:
    """All frames of an opened video: ``times`` (N,) in seconds, and ``read(indices, fit=...)`` -> (T, H, W, 3)."""

    times: np.ndarray
    duration: float
    read: Callable[..., np.ndarray]


def check_video(
    source: Any, options: VideoOptions, *, budget: PixelBudget | None = None, media_root: str | Path | None = None
) -> Clip:
    """Return the clip of :func:`load_video` with its first frame in the place of all: only that is decoded.

    Raises :class:`MediaError` for what is wrong with a video as far as that shows. Of a list, every frame that would
    be used is read. Damage in the middle of a file is found only by :func:`load_video`.
    """
    return load_video(source, options, budget=budget, media_root=media_root, first_only=True)


def load_video(
    source: Any,
    options: VideoOptions,
    *,
    budget: PixelBudget | None = None,
    media_root: str | Path | None = None,
    cache: str | Path | None = None,
    first_only: bool = False,
) -> Clip:
    """Return the frames of ``source`` that ``options`` ask for. With fewer than asked for, all of them, none twice.

    ``budget``: what gives the frames their size; without one they are scaled down to ``max_pixels``. With
    ``media_root``, relative paths start there and no path may leave it. ``cache``: a folder that keeps the clips of
    video files (see :mod:`trl_vpo.media.frame_cache`). ``first_only``: as :func:`check_video` asks for.
    """
    name, entry = describe(source), None
    source, options, frames_fps = _unpack(source, options, name)
    source = frame_folder(source, media_root) or source
    is_file = isinstance(source, _FILE)
    if is_file:
        data = read_source(source, media_root)
        entry = Entry(cache, data, options, budget) if cache is not None and isinstance(data, Path) else None
        if entry and (stored := entry.read()):
            return Clip(**stored, source=name, budget=budget)
        table = scan(data, name)
        frames = _Frames(table.times, table.duration, partial(decode, data, table, name=name))
    else:
        frames = _from_list(source, options, frames_fps, media_root, name)
    indices, span = sample_frames(frames.times, frames.duration, options, name)
    fit = partial(budget.size, frames=len(indices)) if budget else fit_pixels
    fit = partial(fit, max_pixels=options.max_pixels)
    pixels = frames.read(indices[:1] if is_file and first_only else indices, fit=fit)
    pixels = np.broadcast_to(pixels, (len(indices), *pixels.shape[1:])) if len(pixels) < len(indices) else pixels
    times, total = np.maximum(frames.times[indices], options.video_start or 0), len(frames.times)
    clip = Clip(pixels, times, total / frames.duration, total, frames.duration, name, span, budget)
    if entry:
        entry.write({field: getattr(clip, field) for field in FIELDS})
    return clip


def frame_size(source: Any, *, media_root: str | Path | None = None) -> tuple[int, int]:
    """Return (width, height) of the frames of a video as they are stored, upright."""
    source = {**source, "max_pixels": None} if isinstance(source, dict) else source
    frames = check_video(source, VideoOptions(num_frames=1), media_root=media_root).frames
    return frames.shape[2], frames.shape[1]


def _unpack(source: Any, options: VideoOptions, name: str) -> tuple[Any, VideoOptions, float | None]:
    """Return what holds the video, the options with a dict's own put over them, and frames_fps."""
    if not isinstance(source, dict):
        return source, options, None
    entries = {key: value for key, value in source.items() if value is not None and key != "type"}
    payload = next((entries[key] for key in _PAYLOAD if key in entries), None)
    own = {key: value for key, value in entries.items() if key not in (*_PAYLOAD, "frames_fps")}
    known = [field.name for field in fields(VideoOptions)]
    if payload is None:
        raise MediaError(f"{name} names no video: give `path` or `bytes`.")
    if unknown := set(own) - set(known):
        valid = ", ".join(["path", "bytes", "video", "frames_fps", *known])
        raise MediaError(f"{name} has unknown keys {sorted(unknown)}: valid are {valid}.")
    if "fps" in own or "num_frames" in own:  # either one replaces both
        own = {"fps": None, "num_frames": None, **own}
    frames_fps = entries.get("frames_fps")
    try:
        options = replace(options, **own)
        if frames_fps is not None and not 0 < float(frames_fps) < math.inf:
            raise ValueError(f"frames_fps is {frames_fps!r}: give a number above 0, or leave it out.")
    except (ValueError, TypeError) as error:
        raise MediaError(f"{name}: {error}") from error
    if isinstance(payload, dict):
        return _unpack({**payload, "frames_fps": frames_fps}, options, name)
    return payload, options, frames_fps


def _from_list(
    source: Any, options: VideoOptions, frames_fps: float | None, media_root: str | Path | None, name: str
) -> _Frames:
    """Open a list or an array of frames."""
    if hasattr(source, "get_frames_at"):  # torchcodec's
        raise MediaError(
            f"{name} is a video that `datasets` decodes: cast its column to datasets.Video(decode=False)."
        )
    array = isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 4 and source.shape[3] == 3
    if not (array or isinstance(source, (list, tuple))):
        raise MediaError(f"{name} is not a video: give a path, bytes, a list of frames or a uint8 array (T, H, W, 3).")
    if not (source.size if array else source):
        raise MediaError(f"{name} is empty: a video needs at least one frame.")
    if frames_fps is None and (options.video_start is not None or options.video_end is not None):
        raise MediaError(
            f"{name} has no clock for video_start and video_end: give its `frames_fps`, or leave them out."
        )

    def read(indices: np.ndarray, fit: Fit) -> np.ndarray:
        pictures: list[np.ndarray] = []
        for index in indices.tolist():
            try:
                image = load_image(source[index], media_root=media_root, limit=options.max_pixels is None)
            except MediaError as error:
                raise MediaError(f"frame {index} of {name}: {error}") from error
            pictures.append(np.asarray(resized(image, fit(*image.size))))
            if pictures[-1].shape != pictures[0].shape:
                first, this = (f"{shape[1]}x{shape[0]}" for shape in (pictures[0].shape, pictures[-1].shape))
                raise MediaError(
                    f"{name}: frame {index} is {this}, frame {indices[0]} is {first}: the frames of one video must "
                    "have one size, bring them to it first."
                )
        return np.stack(pictures)

    rate = float(frames_fps or options.fps or LIST_FPS)
    return _Frames(np.arange(len(source)) / rate, len(source) / rate, read)
