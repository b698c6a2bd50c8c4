"""Rows and real media files for tests."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

KITS = Path(__file__).parent  # scripts that tests start
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 200, 60)}


def write_image(path: Path, size=(56, 56), seed=0) -> str:
    """A png of (width, height): a background that the seed decides, with a brighter square and a little noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 20, (size[1], size[0], 3)) + list(COLOURS.values())[seed % len(COLOURS)]
    pixels[10:30, 5 + 10 * seed : 25 + 10 * seed] = 255
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def write_clip(path: Path, frames=12, size=(64, 64), fps=10, seed=0) -> str:
    """An h264 mp4 of a square that moves to the right over a changing grey."""
    colour = list(COLOURS.values())[seed % len(COLOURS)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 10 * seed + 5 * i, np.uint8)
            picture[20:40, 2 * i : 2 * i + 20] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def message(role: str, *parts: str) -> list[dict]:
    """One message; "<image>" and "<video>" among the parts are placeholders."""
    content = [{"type": p[1:-1]} if p in ("<image>", "<video>") else {"type": "text", "text": p} for p in parts]
    return [{"role": role, "content": content}]


def row(kind: str | None, media=(), chosen="a red square moves left.", rejected="a blue circle moves left.", **more):
    """A conversational row; `kind` is image, video or None (text only), `media` its sources."""
    parts = [f"<{kind}>"] * len(media) if kind else []
    texts = {
        "prompt": message("user", *parts, "What is in the picture?"),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    }
    return {**texts, **more, **({f"{kind}s": list(media)} if kind else {})}
