"""Video files through PyAV: open them, and find out when each of their frames is shown (:func:`scan`).

Two kinds of container are told apart:

* mp4/mov and Matroska/WebM: every packet carries the time at which its frame is shown. The packets give a table of
  all frames without decoding; a wanted frame is recognised by its time, and decoding may start at any keyframe.
* everything else (AVI, MPEG-TS, raw streams, rarer codecs): packet times cannot be relied on. The frames are counted
  by decoding the file once; frame k is the k-th that comes out of the decoder.

PyAV is given an open file and never a name, so that a name cannot be taken for a protocol ("concat:...") and a
playlist cannot pull in other files.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from trl_vpo.errors import MediaError
from trl_vpo.media.truncation import find_truncation

Container = av.container.InputContainer
# Decoders that turn every packet into exactly one picture. Not VP8 (packets without a picture), nor, outside of mp4,
# MPEG-4 part 2 (packets with two).
_ONE_PICTURE = {"h264", "hevc", "vp9", "libvpx-vp9", "av1", "libdav1d"}
DAMAGED = "the file is damaged or was cut short: fetch or write it again, or drop the row"
_MICROSECOND = 1e-6

# A forked data-loader worker has none of the threads of its parent's decoders and scalers: were it to free one that
# became garbage before the fork, it would wait for those threads for ever. It leaves its parent's objects alone.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class FrameTable:
    """All frames of a video in the order in which they are shown.

    ``times``: (N,) float64, seconds, the first frame at 0. ``pts``: (N,) int64 in units of the stream's time base, or
    None when frames are recognised by counting. ``keyframes``: (K,) ascending, the first frame that each keyframe
    makes decodable; ``seek_points``: (K,) the time stamps to seek to for it. ``duration``: seconds, to the end of the
    last frame.
    """

    times: np.ndarray
    duration: float
    pts: np.ndarray | None = None
    keyframes: np.ndarray | None = None
    seek_points: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.times)

    def keys_of(self, indices: np.ndarray) -> np.ndarray:
        """Return for each frame number (T,) which of the K keyframes is the last one not behind it."""
        return np.searchsorted(self.keyframes, indices, side="right") - 1


@contextmanager
def _open_file(data: Path | bytes, name: str) -> Iterator[BinaryIO]:
    """Open the file; every error of PyAV or of the file system becomes a :class:`MediaError` about ``name``."""
    try:
        with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as file:
            yield file
    except (MediaError, MemoryError):
        raise
    except (av.FFmpegError, EOFError) as error:
        raise MediaError(f"{name} cannot be decoded ({error}): {DAMAGED}.") from error
    except OSError as error:
        raise MediaError(f"{name} cannot be read ({error}): check its permissions and the disk.") from error
    except Exception as error:  # whatever PyAV makes of a file that it was not written for
        raise MediaError(f"{name} cannot be decoded ({error!r}): convert it to h264, or drop the row.") from error


@contextmanager
def open_video(data: Path | bytes, name: str, threads: int = 1) -> Iterator[tuple[Container, av.VideoStream]]:
    """Open the container and its video stream, set to decode in ``threads`` threads."""
    with _open_file(data, name) as file:
        head = file.read(1 << 16)
        file.seek(0)
        try:
            container = av.open(file, metadata_errors="replace", options={"protocol_whitelist": "none"})
        except (av.FFmpegError, ValueError) as error:
            remedy = "check that it is a video and complete."
            if head[4:8] == b"ftyp" and b"moov" not in head:
                remedy = "an mp4 without its index (no moov atom), so most likely cut short: fetch or write it again."
            raise MediaError(f"{name} cannot be opened as a video ({error}): {remedy}") from error
        with container:
            if container.format.name == "webp_pipe" and head[12:16] == b"VP8X" and head[20] & 2:
                raise MediaError(
                    f"{name} is an animated WebP, which FFmpeg does not decode: convert it to an animated PNG "
                    "(with Pillow: Image.open(path).save('clip.png', save_all=True)) or mp4, or give a list of frames."
                )
            stream = _video_stream(container, name)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream


def _video_stream(container: Container, name: str) -> av.VideoStream:
    """Return the best real video stream; cover pictures of audio files are none."""
    picture = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & picture]
    best = container.streams.best("video")
    if not streams or container.format.name == "tty":  # "tty" is how FFmpeg plays text files
        others = "audio only" if container.streams.audio else f"format {container.format.name}"
        raise MediaError(f"{name} has no video stream ({others}): give a file with pictures in it, or drop the row.")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{name} has pictures in a format that FFmpeg cannot decode here: convert it, e.g. to h264.")
    return stream


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def max_threads() -> int:
    """Return how many threads may decode: one in a worker of a data loader, where the workers are the parallelism."""
    return 1 if multiprocessing.parent_process() is not None else min(4, usable_cores())


def scan(data: Path | bytes, name: str) -> FrameTable:
    """Return the table of all frames. Reads the whole file, decodes only where packets cannot be relied on."""
    with _open_file(data, name) as file:
        if missing := find_truncation(file, file.seek(0, os.SEEK_END)):
            raise MediaError(f"{name} is truncated: {missing}. Fetch or write it again, or drop the row.")
    with open_video(data, name, max_threads()) as (container, stream):
        names, codec = container.format.name.split(","), stream.codec_context.name
        one_picture = codec in _ONE_PICTURE and ("mov" in names or "matroska" in names)
        read = _table_from_packets if one_picture or (codec == "mpeg4" and "mov" in names) else _table_from_frames
        table = read(container, stream, name)
        if table is None:
            raise MediaError(f"{name} holds a video stream without a single frame: write it again, or drop the row.")
        if len(container.streams) == 1 and container.duration:  # the header speaks of this stream
            promised = (container.duration - max(0, container.start_time or 0)) * _MICROSECOND
        elif stream.duration:
            promised = float(stream.duration * stream.time_base)
        else:  # Matroska with sound
            tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
            promised = float(tag[1]) * 3600 + float(tag[2]) * 60 + float(tag[3]) if tag else 0
        if table.duration < 0.9 * promised - 0.5:
            raise MediaError(
                f"{name} is incomplete: its header promises {promised:.2f} s of video, it holds {table.duration:.2f} "
                f"that can be decoded: {DAMAGED}."
            )
    return table


def _table_from_packets(container: Container, stream: av.VideoStream, _: str) -> FrameTable | None:
    packets = [
        (packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
        for packet in container.demux(stream)
        if packet.size and packet.pts is not None
    ]
    keys = sorted(pts for pts, _, is_key, _ in packets if is_key)
    # Not shown: what an edit list cuts away (its keyframes still serve), and what precedes the first keyframe.
    shown = sorted((pts, last) for pts, last, _, cut in packets if not cut and keys and pts >= keys[0])
    if not shown:
        return None
    pts = np.array([pts for pts, _ in shown], dtype=np.int64)
    return FrameTable(
        times=(pts - pts[0]) * float(stream.time_base),
        duration=_duration(pts, shown[-1][1], stream),
        pts=pts,
        keyframes=np.searchsorted(pts, keys),
        # FFmpeg takes the time to seek to for a time of showing; with the decoding time it lands a keyframe too early.
        seek_points=np.array(keys, dtype=np.int64),
    )


def _table_from_frames(container: Container, stream: av.VideoStream, name: str) -> FrameTable | None:
    shown, packets, sent, lasts, patched = [], [], [], {}, []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard and (packet.is_keyframe or packets):  # an edit list cuts frames away
            packets.append(packet.pts)
        sent += [packet.dts] if packet.size else []
        lasts[packet.pts] = packet.duration or 0
        for frame in packet.decode():
            shown.append(frame.pts)
            patched.append(frame.is_corrupt)
    if not shown:
        return None
    if any(patched[-4:]):  # the last to be decoded may be shown a little earlier
        raise MediaError(f"{name} ends in a broken picture: {DAMAGED}.")
    # The frames that the file itself claims to store. A mov counts what an edit list cuts away; the header of an AVI
    # counts repeated pictures as well, its index (PyAV >= 17) does not.
    avi = container.format.name == "avi"
    indexed = len(getattr(stream, "index_entries", ())) if avi else stream.frames
    indexed = 0 if "mov" in container.format.name else indexed
    # A recording may begin between keyframes: pictures that need earlier ones are not shown.
    begin = min((pts for pts in shown if pts is not None), default=None)
    promised = max(sum(None in (pts, begin) or pts >= begin for pts in packets), indexed)
    # VP8 sends pictures that are never shown; packed MPEG-4 ends on an empty packet.
    if stream.codec_context.name not in ("vp8", "libvpx") and len(shown) < promised - 1 - promised // 100:
        raise MediaError(f"{name} gives {len(shown)} of its {promised} frames: {DAMAGED}.")
    in_order = sent if len(sent) == len(shown) else []  # AVI has no other times for frames out of order
    for times in (shown, in_order):
        pts = np.array([-1 if value is None else value for value in times], dtype=np.int64)
        if len(pts) and (np.diff(pts) > 0).all() and pts[0] >= 0:
            last = lasts.get(shown[-1], 0)
            if avi and indexed:  # all is there: the last picture is repeated
                last = max(last, (stream.duration or 0) - int(pts[-1]))
            return FrameTable((pts - pts[0]) * float(stream.time_base), _duration(pts, last, stream))
    rate = _rate(stream)  # no usable times: evenly spaced
    return FrameTable(np.arange(len(shown)) / rate, len(shown) / rate)


def _duration(pts: np.ndarray, last: int, stream: av.VideoStream) -> float:
    """Return the seconds to the end of the last frame, which stays for ``last`` units or as long as is usual."""
    if last <= 0 and len(pts) > 1:
        last = int(np.median(np.diff(pts)))
    if last <= 0:
        return float(pts[-1] - pts[0]) * float(stream.time_base) + 1 / _rate(stream)
    return float(pts[-1] - pts[0] + last) * float(stream.time_base)


def _rate(stream: av.VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)
