"""16 frames, evenly spread, of h264 clips of 640x360 pixels at 30 frames a second, in RGB and full size.

Keyframes every 12, 48 or 250 frames (what players' recordings, and libx264 by itself, have). The long clip repeats
its first minute: the same packets, later. `ours again` is ours with a frame cache that holds the clip.
"""

import importlib.util
import tempfile
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from transformers import video_utils

from benchmarks.common import in_turn, memory_of, peak_mib, show, summary
from trl_vpo.media.load import VideoOptions, load_video

WIDTH, HEIGHT, FPS, FRAMES = 640, 360, 30, 16
ENCODED = 60  # seconds; longer clips repeat them
COLUMNS = {
    "method": "loader",
    "clip": "clip",
    "seconds": "seconds (min-max)",
    "peak_mib": "peak MiB",
    "ratio_vs_ours": "this / ours",
    "ratio_vs_fastest": "this / fastest",
}


def write_clip(path: Path, seconds: int, gop: int) -> Path:
    """Textured squares that move over a moving gradient, with a little noise."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (2 * HEIGHT, 2 * WIDTH, 3), dtype=np.uint8) // 8
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "g": str(gop), "crf": "23"}
        for i in range(seconds * FPS):
            picture = np.repeat(((x + 2 * y + 3 * i) // 8 % 200).astype(np.uint8)[..., None], 3, 2)
            picture += texture[i % HEIGHT :, 2 * i % WIDTH :][:HEIGHT, :WIDTH]
            picture[100:200, i % (WIDTH - 100) :][:, :100, i % 3] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def repeat_clip(source: Path, target: Path, times: int) -> Path:
    with av.open(str(target), "w") as new:
        stream = None
        for k in range(times):
            with av.open(str(source)) as old:
                first = old.streams.video[0]
                stream = stream or new.add_stream_from_template(first)
                for packet in old.demux(first):
                    if packet.size:
                        later = k * first.duration
                        packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                        new.mux(packet)
    return target


def ours(path: str, cache: str | None = None) -> np.ndarray:
    return load_video(path, VideoOptions(num_frames=FRAMES), cache=cache).frames


def transformers_pyav(path: str) -> np.ndarray:
    return video_utils.load_video(path, num_frames=FRAMES, backend="pyav")[0]


def spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, FRAMES).round().astype(int).tolist()


def torchcodec(path: str) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC")
    return decoder.get_frames_at(spread(decoder.metadata.num_frames)).data.numpy()


def decord(path: str) -> np.ndarray:
    from decord import VideoReader

    reader = VideoReader(path)
    return reader.get_batch(spread(len(reader))).asnumpy()


LOADERS = {"ours": ours, "transformers (pyav)": transformers_pyav, "torchcodec": torchcodec, "decord": decord}
MISSING = [name for name in ("decord", "torchcodec") if not importlib.util.find_spec(name)]


def checked(load: Callable[[str], np.ndarray], path: str) -> None:
    shape = load(path).shape
    if shape != (FRAMES, HEIGHT, WIDTH, 3):
        raise RuntimeError(f"{load} gave {shape} for {path}")


def measure_memory(args: Namespace) -> dict:
    name, path = args.candidate.split(":", 1)
    load = LOADERS[name]
    with tempfile.TemporaryDirectory() as folder:  # what the first call of anything takes is not the clip's
        checked(load, str(write_clip(Path(folder) / "short.mp4", 1, 12)))
    return {"peak_mib": peak_mib(partial(checked, load, path), "cpu")}


def run(args: Namespace) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name, path, seconds in _clips(Path(folder), args):
            rows += _at(name, str(path), args, max(1, args.repeats // 2) if seconds > ENCODED else args.repeats)
    show(f"{FRAMES} frames of {WIDTH}x{HEIGHT} h264, {FPS} fps", rows, COLUMNS)
    for name in MISSING:
        print(f"{name}: not installed")
    return rows


def _clips(folder: Path, args: Namespace):
    longest = max(args.gops)
    for seconds in args.seconds:
        if seconds <= ENCODED:
            for gop in args.gops:
                path = write_clip(folder / f"{seconds}-{gop}.mp4", seconds, gop)
                yield f"{seconds} s, keyframe every {gop}", path, seconds
        else:
            minute = folder / f"{ENCODED}-{longest}.mp4"
            if not minute.exists():
                write_clip(minute, ENCODED, longest)
            path = repeat_clip(minute, folder / f"{seconds}.mp4", round(seconds / ENCODED))
            yield f"{seconds} s, keyframe every {longest}", path, seconds


def _at(name: str, path: str, args: Namespace, repeats: int) -> list[dict]:
    candidates = {n: partial(checked, load, path) for n, load in LOADERS.items() if n not in MISSING}
    with tempfile.TemporaryDirectory() as cache:
        candidates["ours again"] = partial(checked, partial(ours, cache=cache), path)
        timed = in_turn(candidates, repeats)
    rows = [{"method": method, "clip": name, **summary(s)} for method, s in timed.items()]
    fastest = min(row["seconds"] for row in rows if row["method"] != "ours again")
    for row in rows:
        if row["method"] in LOADERS:
            row |= memory_of(args, f"{row['method']}:{path}")
        row["ratio_vs_ours"] = row["seconds"] / rows[0]["seconds"]
        row["ratio_vs_fastest"] = row["seconds"] / fastest
    return rows
