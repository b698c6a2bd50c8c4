"""A small world that can be seen: clips of one coloured shape that moves, and scenes of two shapes side by side.

Everything is drawn from a numpy generator, so a seed fixes the facts, the pixels and the files. Two habits run
through the world that the base model grows up in (`habits=True`): squares are mostly red and circles mostly move
left, and when one is not, the people who wrote its captions usually did not look (`as_described`). The held-out
split (`habits=False`) draws every colour, shape and motion equally often.

Units: pixels, x to the right and y downwards. Frames are uint8 arrays of shape (T, H, W, 3), RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 180, 60),
    "blue": (45, 75, 230),
    "yellow": (235, 220, 50),
    "white": (240, 240, 240),
    "purple": (165, 50, 205),
}
SHAPES = ("square", "circle", "triangle", "cross")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # unit steps (x, y)

USUAL_COLOUR = {"square": "red"}
USUAL_MOTION = {"circle": "left"}
HABIT = 0.8  # share of squares that are red, and of circles that move left, where the habits rule

SIZE = 56  # height and width of a clip, height of a scene; a scene is two of them wide
NUM_FRAMES = 8
BACKGROUND_MAX = 110  # no channel of the background, and at least one of every thing, is brighter
NO_LOOKAHEAD = "mbtree=0:rc-lookahead=0"  # with its lookahead, x264 writes other bytes now and then
FRAME_RATE = 4  # frames per second: a clip lasts two seconds


@dataclass(frozen=True)
class Thing:
    """One coloured shape: its motion (None in a scene) and its box (x0, y0, x1, y1) in the first frame."""

    colour: str
    shape: str
    motion: str | None = None
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, eq=False)
class Sample:
    """A clip (one thing, 8 frames) or a scene (two things from left to right, 1 frame)."""

    kind: str  # "clip" or "scene"
    things: tuple[Thing, ...]
    frames: np.ndarray  # (T, H, W, 3) uint8


def draw_sample(kind: str, rng: np.random.Generator, *, habits: bool) -> Sample:
    """Draw one clip or scene; with `habits` the usual colours and motions prevail, else all are equally likely."""
    return {"clip": _draw_clip, "scene": _draw_scene}[kind](rng, habits)


def draw_samples(kind: str, count: int, seed: int, *, habits: bool) -> list[Sample]:
    """Draw `count` samples from a seed. The two kinds and the two splits never share a random stream."""
    rng = np.random.default_rng([seed, ("clip", "scene").index(kind), int(habits)])
    return [draw_sample(kind, rng, habits=habits) for _ in range(count)]


def as_usual(things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """Give things the colour and the motion that their shape usually has: what a guess would say."""
    return tuple(
        replace(
            thing,
            colour=USUAL_COLOUR.get(thing.shape, thing.colour),
            motion=thing.motion and USUAL_MOTION.get(thing.shape, thing.motion),
        )
        for thing in things
    )


# --- drawing (the order of the draws decides what a seed gives) ---------------------------------------------------


def _draw_facts(rng: np.random.Generator, shape: str, habits: bool, moves: bool) -> Thing:
    colour = str(rng.choice(list(COLOURS)))
    motion = str(rng.choice(list(MOTIONS))) if moves else None
    thing = Thing(colour, shape, motion)
    return as_usual((thing,))[0] if habits and rng.random() < HABIT else thing


def _draw_clip(rng: np.random.Generator, habits: bool) -> Sample:
    thing = _draw_facts(rng, str(rng.choice(SHAPES)), habits, moves=True)
    frames = _background(rng, NUM_FRAMES, SIZE)
    radius = rng.uniform(0.20, 0.28) * SIZE
    xs, ys = (_track(step, radius, rng) for step in MOTIONS[thing.motion])
    ink = _ink(thing.colour, rng)
    masks = [shape_mask(thing.shape, SIZE, SIZE, x, y, radius) for x, y in zip(xs, ys)]
    for frame, mask in zip(frames, masks):
        frame[mask] = ink
    return Sample("clip", (replace(thing, box=_box(masks[0])),), _grain(frames, rng))


def _draw_scene(rng: np.random.Generator, habits: bool) -> Sample:
    shapes = rng.choice(SHAPES, size=2, replace=False)
    frames = _background(rng, 1, 2 * SIZE)
    things = []
    for place, shape in enumerate(shapes):
        thing = _draw_facts(rng, str(shape), habits, moves=False)
        radius = rng.uniform(0.20, 0.28) * SIZE
        x = place * SIZE + rng.uniform(radius + 2, SIZE - radius - 2)
        y = rng.uniform(radius + 2, SIZE - radius - 2)
        mask = shape_mask(thing.shape, SIZE, 2 * SIZE, x, y, radius)
        frames[0, mask] = _ink(thing.colour, rng)
        things.append(replace(thing, box=_box(mask)))
    return Sample("scene", tuple(things), _grain(frames, rng))


def shape_mask(shape: str, height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    """Return the pixels (H, W) bool that a shape covers, centred at (x, y)."""
    rows, columns = np.mgrid[:height, :width]
    dx, dy = abs(columns - x), rows - y
    if shape == "square":
        return (dx <= 0.85 * radius) & (abs(dy) <= 0.85 * radius)
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "triangle":
        return (dy <= 0.8 * radius) & (dy >= -radius) & (dx <= 0.6 * (dy + radius))
    dy = abs(dy)  # a cross
    return ((dx <= 0.3 * radius) & (dy <= radius)) | ((dy <= 0.3 * radius) & (dx <= radius))


def _track(step: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Return centre positions (T,) along one axis: at rest (step 0), or 30-42 % of the picture in equal steps."""
    low, high = radius, SIZE - radius
    if step == 0:
        return np.full(NUM_FRAMES, rng.uniform(low, high))
    span = rng.uniform(0.30, 0.42) * SIZE
    start = rng.uniform(low, high - span)
    return np.linspace(start, start + span, NUM_FRAMES)[::step]


def _background(rng: np.random.Generator, frames: int, width: int) -> np.ndarray:
    return np.broadcast_to(rng.integers(0, 50, 3).astype(np.uint8), (frames, SIZE, width, 3)).copy()


def _ink(colour: str, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255).astype(np.uint8)


def _grain(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(frames.astype(np.int16) + rng.integers(-6, 7, frames.shape), 0, 255).astype(np.uint8)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the tight half-open box (x0, y0, x1, y1) around the true pixels of a mask (H, W)."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


# --- files --------------------------------------------------------------------------------------------------------


def write_sample(sample: Sample, path: Path) -> Path:
    """Write a clip as h264 mp4 or a scene as png and return the path. The same frames give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sample.kind == "scene":
        Image.fromarray(sample.frames[0]).save(path)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE))
        stream.height, stream.width = sample.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": NO_LOOKAHEAD}
        for frame in sample.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path
