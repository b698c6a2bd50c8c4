"""Chosen frames of a video file as RGB, by decoding from the start or by seeking, whichever is less work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from trl_vpo.errors import MediaError
from trl_vpo.media.video import DAMAGED, Container, FrameTable, max_threads, open_video

Fit = Callable[[int, int], tuple[int, int]] | None
SEEK_COST = 8  # a seek takes about as long as decoding this many frames in one thread


def decode(
    data: Path | bytes, table: FrameTable, indices: np.ndarray, name: str, *, fit: Fit = None, seek: bool | None = None
) -> np.ndarray:
    """Return the frames numbered ``indices`` (T,) ascending: (T, H, W, 3) uint8 RGB, upright.

    ``fit`` gives the (width, height) of a frame for those that it has; None: they stay. ``seek`` False decodes from
    the start in several threads; True jumps from keyframe to keyframe in one, because a jump throws away what other
    threads are working on; None takes what :func:`seeking_pays` says. Should a jump miss its frame, all is decoded
    from the start. Raises :class:`MediaError` when a frame of the table does not come.
    """
    threads = max_threads()
    if table.pts is not None and (seeking_pays(table, indices, threads) if seek is None else seek):
        with suppress(MediaError):  # the decoding from the start says what is wrong, if anything is
            return decode_once(data, table, indices, name, fit, seek=True)
    return decode_once(data, table, indices, name, fit, threads=threads)


def seeking_pays(table: FrameTable, indices: np.ndarray, threads: int = 1) -> bool:
    """Return True if jumping means fewer frames to decode than from the start, which ``threads`` threads share."""
    cost = position = 0
    for index, key in zip(indices, table.keyframes[table.keys_of(indices)]):
        jump = key - position > SEEK_COST
        cost += SEEK_COST + index + 1 - key if jump else index + 1 - position
        position = index + 1
    return bool(cost < (indices[-1] + 1) / threads)


def decode_once(
    data: Path | bytes,
    table: FrameTable,
    indices: np.ndarray,
    name: str,
    fit: Fit = None,
    *,
    seek: bool = False,
    threads: int = 1,
) -> np.ndarray:
    """Decode in one way, without a second attempt; see `decode`."""
    pictures, first, done = None, None, 0
    with open_video(data, name, threads) as (container, stream):
        if table.pts is None:
            every = enumerate(_intact(container.decode(stream), table, indices))
            frames = (frame for number, frame in islice(every, indices[-1] + 1) if number in indices)
        else:
            frames = _by_time(container, stream, table, indices, seek)
        for frame in frames:
            first = first or frame
            size = first.width, first.height
            picture = _to_rgb(frame, fit(*size) if fit else size)
            if pictures is None:
                pictures = np.empty((len(indices), *picture.shape), dtype=np.uint8)
            # A stream may go on in another size, which is scaled to the first; another shape would be squashed.
            stretched = abs(frame.width * first.height / (frame.height * first.width) - 1)
            if picture.shape != pictures.shape[1:] or stretched >= 0.02:
                raise MediaError(
                    f"{name} changes its shape: frame {indices[done]}, at {table.times[indices[done]]:.2f} s, is "
                    f"{frame.width}x{frame.height}, frame {indices[0]} is {first.width}x{first.height}. Write it with "
                    "one size, or keep video_start and video_end on one side of the change."
                )
            pictures[done] = picture
            done += 1
    if done < len(indices):
        raise MediaError(
            f"{name} breaks off: frame {indices[done]} of {len(table)}, at {table.times[indices[done]]:.2f} s, cannot "
            f"be decoded (after {done} of the {len(indices)} wanted frames): {DAMAGED}."
        )
    return pictures


def _by_time(
    container: Container, stream: av.VideoStream, table: FrameTable, indices: np.ndarray, seek: bool
) -> Iterator[av.VideoFrame]:
    """Give the frames by their time stamps; end early at one that does not come."""
    targets = set(table.pts[indices].tolist())
    position, frames = 0, _intact(needed_frames(container, stream, targets), table, indices)
    for index, key in zip(indices, table.keys_of(indices)):
        if seek and table.keyframes[key] - position > SEEK_COST:
            container.seek(int(table.seek_points[key]), stream=stream)
            frames = _intact(needed_frames(container, stream, targets), table, indices)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= table.pts[index]), None)
        if frame is None or frame.pts != table.pts[index]:
            return
        position = index + 1
        yield frame


def needed_frames(container: Container, stream: av.VideoStream, targets: set[int]) -> Iterator[av.VideoFrame]:
    """Decode on from where the container is, without frames outside of ``targets`` from which no other is predicted.

    Only the decoder of H.264 knows such frames for certain.
    """
    context = stream.codec_context
    for packet in container.demux(stream):
        if context.name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
        yield from packet.decode()


def _intact(frames: Iterable[av.VideoFrame], table: FrameTable, indices: np.ndarray) -> Iterator[av.VideoFrame]:
    """Give frames up to the first that FFmpeg had to patch: what is predicted from it is wrong too, and not marked."""

    def matters(frame: av.VideoFrame) -> bool:
        if table.pts is None or frame.pts is None:
            return True  # else only those between the same keyframes as a chosen frame
        return table.keys_of(np.searchsorted(table.pts, frame.pts)) in table.keys_of(indices)

    return takewhile(lambda frame: not (frame.is_corrupt and matters(frame)), frames)


def _name_side_data(cls: type[SideDataType], value: int) -> SideDataType:
    """Return a member for a type of side data that FFmpeg has and PyAV does not (EXIF is 31)."""
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


# One such type and PyAV refuses to look at any side data of the frame, its display matrix too.
SideDataType._missing_ = classmethod(_name_side_data)


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Return a decoded frame as (H, W, 3) uint8, scaled to ``size`` by FFmpeg's converter, upright.

    A display matrix turns and mirrors in quarters: (x, y) is shown at (a x + c y, b x + d y).
    """
    picture = frame.to_ndarray(format="rgb24", width=size[0], height=size[1], interpolation="BICUBIC")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(b) > abs(a):  # x is shown downwards
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
