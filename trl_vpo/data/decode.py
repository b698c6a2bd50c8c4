"""Chosen frames of a video file as RGB, by decoding from the start or by seeking, whichever is less work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from trl_vpo.data.images import MediaError, fit_pixels
from trl_vpo.data.video import DAMAGED, FrameTable, max_threads, open_video

SEEK_COST = 8  # a seek takes about as long as decoding this many frames in one thread


def decode(
    data: Path | bytes,
    table: FrameTable,
    wanted: np.ndarray,
    name: str,
    *,
    max_pixels: int | None = None,
    seek: bool | None = None,
) -> np.ndarray:
    """The frames numbered ``wanted`` (T,) ascending, as (T, H, W, 3) uint8 RGB, upright, at most ``max_pixels`` each.

    ``seek`` False decodes from the start in several threads; True jumps from keyframe to keyframe in one, because a
    jump throws away what other threads are working on; None takes what :func:`seeking_pays` says. Both give the same
    frames, and only the wanted ones are converted to RGB. Should a jump miss its frame, all is decoded from the
    start. Raises :class:`MediaError` when a frame of the table does not come out of the decoder.
    """
    threads = max_threads()
    if table.pts is not None and (seeking_pays(table, wanted, threads) if seek is None else seek):
        try:
            return _decode(data, table, wanted, name, max_pixels, seek=True, threads=1)
        except MediaError:
            pass  # the decoding from the start says what is wrong, if anything is
    return _decode(data, table, wanted, name, max_pixels, seek=False, threads=threads)


def seeking_pays(table: FrameTable, wanted: np.ndarray, threads: int = 1) -> bool:
    """Whether jumping means less than the work of decoding from the start, which ``threads`` threads share.

    Both are counted in frames to decode, a jump as ``SEEK_COST`` frames: keyframes that are dense in comparison with
    the wanted frames favour jumping, and so does a window late in the file.
    """
    cost = position = 0
    for index, key in zip(wanted, table.keyframes[table.keys_of(wanted)]):
        jump = key - position > SEEK_COST
        cost += SEEK_COST + index + 1 - key if jump else index + 1 - position
        position = index + 1
    return bool(cost < (wanted[-1] + 1) / threads)


def _decode(
    data: Path | bytes,
    table: FrameTable,
    wanted: np.ndarray,
    name: str,
    max_pixels: int | None,
    *,
    seek: bool,
    threads: int,
) -> np.ndarray:
    pictures, size, done = None, None, 0
    with open_video(data, name, threads) as (container, stream, _):
        counted = table.pts is None
        found = _by_count(container, stream, wanted) if counted else _by_time(container, stream, table, wanted, seek)
        for frame in found:
            if frame.is_corrupt:
                break
            size = size or fit_pixels(frame.width, frame.height, max_pixels)  # the first frame's, should it change
            picture = _to_rgb(frame, size)
            if pictures is None:
                pictures = np.empty((len(wanted), *picture.shape), dtype=np.uint8)
            pictures[done] = picture
            done += 1
    if done < len(wanted):
        index = wanted[done]
        raise MediaError(
            f"{name} breaks off: frame {index} of {len(table)}, at {table.times[index]:.2f} s, cannot be decoded "
            f"(after {done} of the {len(wanted)} wanted frames): {DAMAGED}."
        )
    return pictures


def _by_time(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    table: FrameTable,
    wanted: np.ndarray,
    seek: bool,
) -> Iterator[av.VideoFrame]:
    """The wanted frames, recognised by their time stamps; ends early at one that does not come."""
    targets = set(table.pts[wanted].tolist())
    position, frames = 0, _needed(container, stream, targets)
    for index, key in zip(wanted, table.keys_of(wanted)):
        if seek and table.keyframes[key] - position > SEEK_COST:
            container.seek(int(table.seek_points[key]), stream=stream)
            frames = _needed(container, stream, targets)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= table.pts[index]), None)
        if frame is None or frame.pts != table.pts[index]:
            return
        position = index + 1
        yield frame


def _needed(
    container: av.container.InputContainer, stream: av.VideoStream, targets: set[int]
) -> Iterator[av.VideoFrame]:
    """Decodes on from where the container is. Frames from which no other is predicted are left out, unless their time
    stamp is in ``targets``: in H.264, whose decoder knows them for certain; of other codecs every frame comes."""
    context = stream.codec_context
    for packet in container.demux(stream):
        if context.name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
        yield from packet.decode()


def _by_count(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: np.ndarray
) -> Iterator[av.VideoFrame]:
    """The wanted frames, recognised by counting what the decoder gives."""
    targets = set(wanted.tolist())
    for count, frame in enumerate(container.decode(stream)):
        if count in targets:
            yield frame
        if count >= wanted[-1]:
            return


def _to_rgb(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """One decoded frame as (H, W, 3) uint8, scaled to ``size`` by FFmpeg's converter, upright."""
    picture = frame.to_ndarray(format="rgb24", width=size[0], height=size[1], interpolation="BICUBIC")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return picture if matrix is None else _upright(picture, np.frombuffer(matrix, np.int32))


def _upright(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turned and mirrored as a display matrix asks, in quarters: (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d, *_ = matrix.tolist()
    if abs(b) > abs(a):  # x is shown downwards
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
