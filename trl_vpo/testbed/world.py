"""A world with more to be wrong about: clips of two or three things with an order of events, scenes of objects.

A thing of a clip has a place, a size, a texture, a colour, a shape and a motion; two things move, one after the
other, and a third stays still. A scene has three or four objects from left to right. A seed fixes facts and pixels.

Habits rule the world that the base grows up in (`habits=True`): large squares are mostly red, small circles mostly
rise; beside a table there is mostly a cup, beside a tree a bird. Its captions are often written by people who did not
look. A fifth of all combinations of attributes is held out: none of them is in a training set.

Units: pixels, x to the right and y downwards. Frames are uint8 arrays of shape (T, H, W, 3), RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import av
import numpy as np
from PIL import Image

from trl_vpo.files import atomic_write

COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 180, 60),
    "blue": (45, 75, 230),
    "yellow": (235, 220, 50),
    "white": (240, 240, 240),
    "purple": (165, 50, 205),
}
SHAPES = ("square", "circle", "triangle", "cross")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
MOTIONS = ("rises", "falls", "flashes")
STILL = "stays still"
PLACES = ("left", "middle", "right")
OBJECTS = ("table", "cup", "tree", "bird", "lamp", "ball", "box", "car")
SCENE_COLOURS = tuple(colour for colour in COLOURS if colour != "red")  # red is the ellipse that LPOI draws
COMPANIONS = {"table": ("white", "cup"), "tree": ("yellow", "bird")}  # what is usually beside it

HABIT = 0.8  # share of usual samples where the habits rule
LANE, HEIGHT = 28, 56  # pixels; things stand beside each other, a lane each
LEVELS = (13, 20, 27, 34, 41)  # heights at which a centre is, at rest
NUM_FRAMES = 8  # two events of four frames each
RADIUS = {"small": 7.0, "large": 11.5}
STRIPES = np.arange(LANE) % 4 < 2  # columns of a lane that are darker where a thing is striped
BACKGROUND_MAX = 60  # no channel of the background, and at least one of every thing, is brighter
FRAME_RATE = 4  # frames per second: a clip lasts two seconds
NO_LOOKAHEAD = "mbtree=0:rc-lookahead=0"  # with its lookahead, x264 writes other bytes now and then


@dataclass(frozen=True)
class Thing:
    """A thing of a clip, or an object of a scene: its `shape` is then a noun, without texture and motion.

    Attributes:
        place: number of its lane from the left.
        turn: 1 or 2, when it moves; 0 where it does not.
        box: (x0, y0, x1, y1) in the first frame.
    """

    size: str
    texture: str | None
    colour: str
    shape: str
    place: int = 0
    motion: str | None = None
    turn: int = 0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.size, self.texture, self.colour, self.shape) if word)

    @property
    def combination(self) -> tuple[str | None, ...]:
        return self.size, self.texture, self.colour, self.shape


Things = tuple[Thing, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    kind: str  # "clip" or "scene"
    things: Things  # from left to right
    frames: np.ndarray  # (T, H, W, 3) uint8


def _held_out() -> frozenset[tuple[str | None, ...]]:
    """Return every fifth combination, spread over the values of each attribute."""
    clips = product(range(2), range(2), range(6), range(4))
    found = {
        (SIZES[s], TEXTURES[t], tuple(COLOURS)[c], SHAPES[f])
        for s, t, c, f in clips
        if (s + 2 * t + c + 2 * f) % 5 == 2
    }
    scenes = product(range(2), range(5), range(8))
    found |= {(SIZES[s], None, SCENE_COLOURS[c], OBJECTS[o]) for s, c, o in scenes if (2 * s + c + 2 * o) % 5 == 2}
    return frozenset(found)


HELD_OUT = _held_out()


# --- facts --------------------------------------------------------------------------------------------------------


def draw_things(
    kind: str, rng: np.random.Generator, *, habits: bool, unseen: bool = False, most: int | None = None
) -> Things:
    """Draw the facts of a sample; with `unseen` also the combinations that are held out, as often as any other.

    Of the things so many from the left are kept as `most` says.
    """
    while True:
        things = (_draw_clip(rng, habits) if kind == "clip" else _draw_scene(rng, habits))[:most]
        if unseen or not any(thing.combination in HELD_OUT for thing in things):
            return things


def as_usual(thing: Thing) -> Thing:
    """Give a thing of a clip the colour or the motion that such a thing usually has."""
    if (thing.size, thing.shape) == ("large", "square"):
        return replace(thing, colour="red")
    if (thing.size, thing.shape) == ("small", "circle") and thing.turn:
        return replace(thing, motion="rises")
    return thing


def missing_companion(things: Things) -> tuple[int, Thing] | None:
    """Return where in a scene habit expects an object that is not there, and the object; else None."""
    shown = {thing.shape for thing in things}
    for number, thing in enumerate(things):
        colour, companion = COMPANIONS.get(thing.shape, (None, None))
        if companion and companion not in shown:
            return number + 1, Thing("small", None, colour, companion)
    return None


def _draw_clip(rng: np.random.Generator, habits: bool) -> Things:
    count = int(rng.integers(2, 4))
    places = sorted(rng.choice(3, size=count, replace=False).tolist())
    turns = rng.permutation([1, 2, 0][:count]).tolist()
    things = []
    for place, turn, shape in zip(places, turns, rng.permutation(SHAPES)):
        motion = str(rng.choice(MOTIONS)) if turn else STILL
        size, texture, colour = (str(rng.choice(values)) for values in (SIZES, TEXTURES, tuple(COLOURS)))
        thing = Thing(size, texture, colour, str(shape), place, motion, turn)
        things.append(as_usual(thing) if habits and rng.random() < HABIT else thing)
    return tuple(things)


def _draw_scene(rng: np.random.Generator, habits: bool) -> Things:
    count = int(rng.integers(3, 5))
    nouns = rng.permutation(OBJECTS).tolist()[:count]
    things = [Thing(str(rng.choice(SIZES)), None, str(rng.choice(SCENE_COLOURS)), noun) for noun in nouns]
    if habits and rng.random() < HABIT:
        for number, thing in enumerate(things):
            colour, companion = COMPANIONS.get(thing.shape, (None, None))
            if companion and companion not in nouns:  # it takes the place of a neighbour that has no companion
                for other in (number + 1, number - 1):
                    if 0 <= other < count and things[other].shape not in (*COMPANIONS, "cup", "bird"):
                        things[other] = replace(things[other], size="small", colour=colour, shape=companion)
                        nouns[other] = companion
                        break
    lanes = sorted(rng.choice(4, size=count, replace=False).tolist())
    return tuple(replace(thing, place=lane) for thing, lane in zip(things, lanes))


# --- pixels -------------------------------------------------------------------------------------------------------


def draw_sample(
    kind: str, rng: np.random.Generator, *, habits: bool, unseen: bool = False, most: int | None = None
) -> Sample:
    """Draw one clip or scene, with the facts of `draw_things`."""
    things = draw_things(kind, rng, habits=habits, unseen=unseen, most=most)
    frames = NUM_FRAMES if kind == "clip" else 1
    lanes = len(PLACES) if kind == "clip" else 4
    background = rng.integers(0, 40, 3).astype(np.uint8)
    picture = np.broadcast_to(background, (frames, HEIGHT, lanes * LANE, 3)).copy()
    drawn = []
    for thing in things:
        ink = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, 3), 0, 255)
        heights, shown = _track(thing, rng, frames)
        masks = [_mask(thing.shape, RADIUS[thing.size], float(y)) for y in heights]
        left = thing.place * LANE
        for frame, mask, visible in zip(picture[:, :, left : left + LANE], masks, shown):
            if visible:
                frame[mask] = ink
                if thing.texture == "striped":
                    frame[mask & STRIPES] = ink * 0.4
        drawn.append(replace(thing, box=_box(masks[0], left)))
    noise = rng.integers(-6, 7, picture.shape)
    return Sample(kind, tuple(drawn), np.clip(picture.astype(np.int16) + noise, 0, 255).astype(np.uint8))


def draw_samples(kind: str, count: int, seed: int, *, habits: bool, unseen: bool = False) -> list[Sample]:
    """Draw `count` samples from a seed. The two kinds and the splits never share a random stream."""
    rng = np.random.default_rng([seed, ("clip", "scene").index(kind), int(habits), int(unseen)])
    return [draw_sample(kind, rng, habits=habits, unseen=unseen) for _ in range(count)]


def _track(thing: Thing, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the height of the centre (T,) and whether the thing is shown (T,) in each frame."""
    shown, way = np.ones(frames, dtype=bool), np.zeros(frames)
    event = slice(4 * thing.turn - 4, 4 * thing.turn)
    if thing.motion in ("rises", "falls"):
        start = float(rng.choice(LEVELS[:3]))  # of the way, seen from above: it is two levels long
        way[event] = np.linspace(0, 14, 4)
        way[event.stop :] = 14
        return (start + way if thing.motion == "falls" else start + 14 - way), shown
    if thing.motion == "flashes":
        shown[event] = [True, False, True, False]
    return way + float(rng.choice(LEVELS)), shown


@cache
def _mask(shape: str, radius: float, height: float) -> np.ndarray:
    """Return the pixels (HEIGHT, LANE) bool that a shape or an object covers in its lane, centred at this height."""
    rows, columns = np.mgrid[:HEIGHT, :LANE]
    right, down = (columns - (LANE - 1) / 2) / radius, (rows - height) / radius
    side, away = abs(right), abs(down)
    if shape in ("square", "box"):
        inside = np.maximum(side, away) <= 0.87
        return inside & (np.maximum(side, away) >= 0.5) if shape == "box" else inside  # a box is hollow
    if shape in ("circle", "ball"):
        return side**2 + away**2 <= 1
    if shape == "triangle":
        return (down <= 0.8) & (down >= -1) & (side <= 0.6 * (down + 1))
    if shape == "cross":
        return ((side <= 0.3) & (away <= 1)) | ((away <= 0.3) & (side <= 1))
    if shape == "table":
        return ((side <= 1) & (down <= 0) & (down >= -0.4)) | ((away <= 0.9) & (down > 0) & (side > 0.6) & (side <= 1))
    if shape == "cup":
        handle = (right > 0.4) & (right <= 1) & (away <= 0.5) & ~((right < 0.75) & (away < 0.25))
        return ((right >= -0.8) & (right <= 0.4) & (away <= 0.75)) | handle
    if shape == "tree":
        return (side**2 + (down + 0.35) ** 2 <= 0.42) | ((side <= 0.18) & (down > 0) & (down <= 1))
    if shape == "bird":
        return (abs(down + 0.5 - side) <= 0.3) & (side <= 1)  # wings raised
    if shape == "lamp":
        shade = (down >= -1) & (down <= 0) & (side <= 0.3 + 0.5 * (down + 1))
        return shade | ((side <= 0.12) & (away <= 1)) | ((side <= 0.6) & (down > 0.75) & (down <= 1))
    wheels = (side - 0.55) ** 2 + (down - 0.6) ** 2 <= 0.09  # a car
    return ((side <= 1) & (down >= 0) & (down <= 0.5)) | ((side <= 0.5) & (down >= -0.5) & (down < 0)) | wheels


def _box(mask: np.ndarray, left: int) -> tuple[int, int, int, int]:
    """Return the tight half-open box (x0, y0, x1, y1) around the true pixels of a lane that begins at `left`."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()) + left, int(ys.min()), int(xs.max()) + 1 + left, int(ys.max()) + 1


# --- files --------------------------------------------------------------------------------------------------------


def write_sample(sample: Sample, path: Path) -> Path:
    """Write a clip as h264 mp4 or a scene as png, whole or not at all, and return the path.

    The same frames give the same bytes.
    """
    with atomic_write(path) as part:
        if sample.kind == "scene":
            Image.fromarray(sample.frames[0]).save(part, format="png")
        else:
            _write_clip(sample.frames, part)
    return path


def _write_clip(frames: np.ndarray, path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": NO_LOOKAHEAD}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
