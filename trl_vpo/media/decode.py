"""Chosen frames of a video file as RGB, by decoding from the start or by seeking, whichever is less work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

import av
import numpy as np

from trl_vpo.errors import MediaError
from trl_vpo.media.images import fit_pixels
from trl_vpo.media.video import DAMAGED, FrameTable, max_threads, open_video

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
    pictures, first, done = None, None, 0
    with open_video(data, name, threads) as (container, stream):
        counted = table.pts is None
        found = (
            _by_count(container, stream, table, wanted)
            if counted
            else _by_time(container, stream, table, wanted, seek)
        )
        for frame in found:
            first = first or frame
            picture = _to_rgb(frame, fit_pixels(first.width, first.height, max_pixels))
            if pictures is None:
                pictures = np.empty((len(wanted), *picture.shape), dtype=np.uint8)
            if picture.shape != pictures.shape[1:] or not _same_shape(frame, first):
                raise MediaError(
                    f"{name} changes its shape: frame {wanted[done]}, at {table.times[wanted[done]]:.2f} s, is "
                    f"{frame.width}x{frame.height}, frame {wanted[0]} is {first.width}x{first.height}. Write it with "
                    "one size, or keep video_start and video_end on one side of the change."
                )
            pictures[done] = picture
            done += 1
    if done < len(wanted):
        index = wanted[done]
        raise MediaError(
            f"{name} breaks off: frame {index} of {len(table)}, at {table.times[index]:.2f} s, cannot be decoded "
            f"(after {done} of the {len(wanted)} wanted frames): {DAMAGED}."
        )
    return pictures


def _same_shape(frame: av.VideoFrame, first: av.VideoFrame) -> bool:
    """A stream may go on in another size, which is scaled to the first; in another shape it would be squashed."""
    return abs(frame.width * first.height / (frame.height * first.width) - 1) < 0.02


def _by_time(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    table: FrameTable,
    wanted: np.ndarray,
    seek: bool,
) -> Iterator[av.VideoFrame]:
    """The wanted frames, recognised by their time stamps; ends early at one that does not come."""
    targets = set(table.pts[wanted].tolist())
    position, frames = 0, _sound(_needed(container, stream, targets), table, wanted)
    for index, key in zip(wanted, table.keys_of(wanted)):
        if seek and table.keyframes[key] - position > SEEK_COST:
            container.seek(int(table.seek_points[key]), stream=stream)
            frames = _sound(_needed(container, stream, targets), table, wanted)
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
    container: av.container.InputContainer, stream: av.VideoStream, table: FrameTable, wanted: np.ndarray
) -> Iterator[av.VideoFrame]:
    """The wanted frames, recognised by counting what the decoder gives."""
    targets = set(wanted.tolist())
    for count, frame in enumerate(_sound(container.decode(stream), table, wanted)):
        if count in targets:
            yield frame
        if count >= wanted[-1]:
            return


def _sound(frames: Iterable[av.VideoFrame], table: FrameTable, wanted: np.ndarray) -> Iterator[av.VideoFrame]:
    """Frames up to the first that FFmpeg had to patch: what is predicted from it is wrong too, and not marked.

    Where keyframes are known, only those between the same keyframes as a wanted frame count.
    """

    def matters(frame: av.VideoFrame) -> bool:
        if table.pts is None or frame.pts is None:
            return True
        return table.keys_of(np.searchsorted(table.pts, frame.pts)) in table.keys_of(wanted)

    return takewhile(lambda frame: not (frame.is_corrupt and matters(frame)), frames)


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
