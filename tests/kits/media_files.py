"""Writers of real video and image files for tests. Every frame shows its own number, readable after lossy coding."""

from __future__ import annotations

import os
import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media.load import VideoOptions, check_video, load_image, load_video

WIDTH, HEIGHT = 64, 48
PIXELS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le", "gif": "rgb8"}  # other codecs take yuv420p
BITS = 8  # columns of WIDTH / BITS pixels, white for 1


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) uint8. From the top: the bits of ``number`` as black and white columns, the highest on the left;
    noise, so that every frame takes up some of the file; a dark red foot.
    """
    image = np.zeros((height, width, 3), np.uint8)
    column = width // BITS
    image[:, : BITS * column] = 255 * np.unpackbits(np.uint8(number)).repeat(column)[:, None]
    noise = np.random.default_rng(number).integers(0, 256, (height // 4, width, 3))
    image[height // 2 : height // 2 + height // 4] = noise
    image[height * 3 // 4 :] = (120, 0, 0)
    return image


def number(frame: np.ndarray) -> int:
    """The number that an upright frame (H, W, 3) of any size shows."""
    row = frame[frame.shape[0] // 4].astype(float).mean(axis=1)  # in the middle of the columns
    centres = (np.arange(BITS) + 0.5) * frame.shape[1] / BITS
    return int(np.packbits(row[centres.astype(int)] > 128)[0])


def numbers(frames: np.ndarray) -> list[int]:
    return [number(frame) for frame in frames]


def needs_pyav(major: int, minor: int, what: str) -> None:
    """Skips the test where PyAV is older; the extra lmms brings PyAV 15."""
    if tuple(map(int, av.__version__.split(".")[:2])) < (major, minor):
        pytest.skip(f"{what} needs PyAV {major}.{minor}, this is {av.__version__}")


def write_video(
    path: Path,
    frames: int = 60,
    *,
    fps: int = 30,
    gop: int = 12,
    bframes: int = 2,
    codec: str = "libx264",
    times: list[int] | None = None,
    last: int = 1,
    audio_seconds: float = 0,
    options=None,
    metadata=None,
    x264: str = "scenecut=0",
    x265: str = "open-gop=0",
) -> Path:
    """A video of numbered frames. ``times``: when each is shown, in units of 1 / fps (else 0, 1, 2, ...).
    ``last``: how long the last one stays, in the same units (not with B-frames).
    """
    with av.open(str(path), "w", options=options or {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, PIXELS.get(codec, "yuv420p")
        stream.thread_count = 1
        if codec == "libx264":
            stream.options = {"g": str(gop), "bf": str(bframes), "crf": "18", "x264-params": x264}
        elif codec == "libx265":
            stream.options = {"x265-params": f"log-level=none:keyint={gop}:{x265}"}
        elif codec == "libsvtav1":
            stream.options = {"svtav1-params": "logical-processors=1", "preset": "12"}
        sound = container.add_stream("aac", rate=16000) if audio_seconds else None
        packets: list[av.Packet] = []
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = (times[i] if times else i), Fraction(1, fps)
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = last
        container.mux(packets)
        if sound:
            mux_silence(container, sound, audio_seconds)
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):  # it gives its caller real-time priority, as root
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_mjpeg(path: Path, jpeg: bytes, frames: int, fps: int = 10) -> Path:
    """A video whose pictures are all the same JPEG file, as cameras write them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for i in range(frames):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, fps), True
            packet.pts, packet.dts, packet.duration = i, i, 1
            container.mux(packet)
    return path


def mux_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * seconds)), np.float32), format="fltp", layout="mono")
    frame.rate, frame.pts = 16000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_audio_only(path: Path, cover: bool = False) -> Path:
    """Sound without pictures, or with a cover picture, which containers store as a video stream."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        if cover:
            needs_pyav(17, 1, "a cover picture that is written")
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")))
            container.mux(art.encode())
        mux_silence(container, sound, 1.0)
    return path


def write_zero_frames(path: Path) -> Path:
    """A fragmented mp4 that ends behind its header: a declared video stream, not one packet."""
    write_video(path, 4, options={"movflags": "empty_moov+frag_keyframe"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moof") - 4])
    return path


def cut(source: Path, target: Path, fraction: float) -> Path:
    """The first part of a file, as a broken download leaves it."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


def overwrite(source: Path, target: Path, start: float, stop: float) -> Path:
    """A file with garbage between two fractions of its length."""
    data = bytearray(source.read_bytes())
    low, high = int(len(data) * start), int(len(data) * stop)
    data[low:high] = b"\xa5" * (high - low)
    target.write_bytes(bytes(data))
    return target


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Writes a display matrix into an mp4's track header: (x, y) is shown at (a x + c y, b x + d y)."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    one = 1 << 16
    data = data[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + data[at + 36 :]
    path.write_bytes(data)
    return path


def remux_shifted(source: Path, target: Path, by: int) -> Path:
    """The same packets, ``by`` frames earlier (mp4 hides what lies before 0 with an edit list) or later."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.pts += packet.duration * by
                packet.dts += packet.duration * by
                packet.stream = stream
                new.mux(packet)
    return target


ORIENTATIONS = {  # EXIF: the display matrix that says the same, and what the stored picture is turned by
    1: ((1, 0, 0, 1), None),
    2: ((-1, 0, 0, 1), "FLIP_LEFT_RIGHT"),
    3: ((-1, 0, 0, -1), "ROTATE_180"),
    4: ((1, 0, 0, -1), "FLIP_TOP_BOTTOM"),
    5: ((0, 1, 1, 0), "TRANSPOSE"),
    6: ((0, 1, -1, 0), "ROTATE_270"),
    7: ((0, -1, -1, 0), "TRANSVERSE"),
    8: ((0, -1, 1, 0), "ROTATE_90"),
}


def upright(orientation: int, pixels: np.ndarray) -> np.ndarray:
    """The picture that a stored one of this orientation shows."""
    turn, image = ORIENTATIONS[orientation][1], Image.fromarray(pixels)
    return np.asarray(image.transpose(Image.Transpose[turn]) if turn else image).astype(int)


def frame_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"frame{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i)).save(path)
    return paths


def refused(source, reason, *, name=None, uses=(load_video, check_video), options=None, **where):
    """Each of `uses` raises a MediaError that gives the reason, names the file, and survives pickling."""
    for use in uses:
        arguments = [] if use is load_image else [options or VideoOptions(num_frames=1000)]
        with pytest.raises(MediaError, match=reason) as caught:
            use(source, *arguments, **where)
        message = str(caught.value)
        assert (name or str(source)) in message and message.endswith("."), message
        again = type(caught.value)(message)  # as torch's DataLoader raises it in the main process
        assert str(again) == message and str(pickle.loads(pickle.dumps(caught.value))) == message
    return caught.value


def refused_image(source, reason, **kwargs):
    return refused(source, reason, uses=[load_image], **kwargs)
