"""The texts of the world: captions that are true, the same with one fact wrong, and questions.

A caption goes from left to right, a sentence for each thing; after the things of a clip it says in which order they
moved, and what stays still. After any true beginning one thing to say next is true, in each of its wordings. So a
caption of a clip has 16 or 32 true paraphrases, that of a scene too. All sentences of the grammar, the false ones too,
are in `studies/testbed/grammar.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from trl_vpo.testbed.world import (
    COLOURS,
    MOTIONS,
    OBJECTS,
    PLACES,
    SCENE_COLOURS,
    SHAPES,
    SIZES,
    STILL,
    TEXTURES,
    Thing,
    Things,
    as_usual,
    missing_companion,
)

PROMPTS = {"clip": "Describe the video.", "scene": "Describe the image."}

WORDINGS = {
    "thing": (
        "the {place} one is a {size} {texture} {colour} {shape}.",
        "the {place} place holds a {size} {texture} {colour} {shape}.",
    ),
    "order": (
        "first the {shape} {motion}, then the {shape} {motion}.",
        "the {shape} {motion} before the {shape} {motion}.",
        "at first the {shape} {motion}, later the {shape} {motion}.",
        "the {shape} {motion}, and then the {shape} {motion}.",
    ),
    "still": ("the {shape} stays still.",),
    "object": ("there is a {size} {paint} {object}.", "one sees a {size} {paint} {object}."),
    "stop": ("that is all.", "nothing else is there."),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question and its answer; kind is "caption", "hinted", "open" or "yes_no"."""

    kind: str
    question: str
    answer: str


# --- captions ---------------------------------------------------------------------------------------------------


def wordings(tag: str) -> tuple[str, ...]:
    """Return the wordings of a sentence: about a place, "order" or "still"; of a scene "object" or "stop"."""
    return WORDINGS.get(tag, WORDINGS["thing"])


def true_next(things: Things, said: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the tag of what is true behind sentences with these tags, and the words that fill its blanks.

    That is the leftmost thing that is left, then the order, then the thing that stays still.
    """
    if things[0].motion is None:
        if len(said) < min(len(things), 4):  # a caption has three or four objects
            thing = things[len(said)]
            return "object", [thing.size, thing.colour, thing.shape]
        ends = len(said) >= max(len(things), 3) and "stop" not in said
        return "stop" if ends else None, []
    if "order" in said:
        still = [thing.shape for thing in things if not thing.turn and "still" not in said]
        return "still" if still else None, still
    right_of = PLACES.index(said[-1]) + 1 if said else 0
    left = [thing for thing in things if thing.place >= right_of]
    if left:
        return PLACES[left[0].place], [left[0].size, left[0].texture, left[0].colour, left[0].shape]
    first, second = sorted((thing for thing in things if thing.turn), key=lambda thing: thing.turn)
    return "order", [first.shape, first.motion, second.shape, second.motion]


def true_sentences(things: Things) -> list[list[str]]:
    """Return the true wordings of each sentence of a caption."""
    found, said = [], []
    tag, facts = true_next(things, said)
    while tag:
        found.append([_filled(text, tag, facts) for text in wordings(tag)])
        said.append(tag)
        tag, facts = true_next(things, said)
    return found


def _filled(text: str, place: str, facts: Sequence[str]) -> str:
    values = iter(facts)
    return re.sub(r"{\w+}", lambda blank: place if blank[0] == "{place}" else next(values), text)


def caption(things: Things, wording: Sequence[int] = (0,) * 5) -> str:
    """Return the true caption whose sentences have these wordings (counted modulo how many there are)."""
    chosen = [options[number % len(options)] for number, options in zip(wording, true_sentences(things))]
    return " ".join(chosen)


def objects_of(things: Things) -> list[str]:
    """Return what a caption may mention: `large plain red square`, and of a clip `square rises`."""
    return [t.name for t in things] + [f"{t.shape} {t.motion}" for t in things if t.motion]


def all_objects() -> list[str]:
    """Return everything that captions of the world can mention; places and the order of events are not in it."""
    columns = (SIZES, TEXTURES, COLOURS, SHAPES), (SIZES, SCENE_COLOURS, OBJECTS), (SHAPES, (*MOTIONS, STILL))
    return [" ".join(words) for own in columns for words in product(*own)]


def draw_wording(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(4, size=6).tolist())


# --- what is false ------------------------------------------------------------------------------------------------


def one_fact_wrong(things: Things, rng: np.random.Generator) -> tuple[Things, Thing]:
    """Return things with one fact changed, and the thing (of the true ones) that it is about.

    The fact is what habit expects where habit is wrong here, else any. A thing that a scene is missing is added beside
    its companion, which is then the thing that it is about.
    """
    usual = [number for number, thing in enumerate(things) if things[0].motion and as_usual(thing) != thing]
    if usual:
        number = usual[rng.integers(len(usual))]
        return (*things[:number], as_usual(things[number]), *things[number + 1 :]), things[number]
    expected = None if things[0].motion else missing_companion(things)
    if expected and len(things) < 4:
        number, companion = expected
        return (*things[:number], companion, *things[number:]), things[number - 1]
    return _change(things, rng)


def _change(things: Things, rng: np.random.Generator) -> tuple[Things, Thing]:
    number = int(rng.integers(len(things)))
    thing, clip = things[number], things[0].motion is not None
    facts = ["size", "colour", "shape", *(["texture"] * clip), *(["motion", "turn"] if thing.turn else [])]
    fact = facts[rng.integers(len(facts))]
    if fact == "turn":
        return tuple(replace(one, turn=(0, 2, 1)[one.turn]) for one in things), thing
    of_clips = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "texture": TEXTURES, "motion": MOTIONS}
    of_scenes = {"shape": OBJECTS, "colour": SCENE_COLOURS, "size": SIZES}
    values = (of_clips if clip else of_scenes)[fact]
    taken = {one.shape for one in things} if fact == "shape" else {getattr(thing, fact)}
    free = [value for value in values if value not in taken]
    wrong = replace(thing, **{fact: free[rng.integers(len(free))]})
    return (*things[:number], wrong, *things[number + 1 :]), thing


# --- questions ----------------------------------------------------------------------------------------------------


def open_items(things: Things) -> list[Item]:
    """Ask for short answers about each thing."""
    asked = {}
    for thing in things:
        asked[f"What colour is the {thing.shape}?"] = thing.colour
        asked[f"How big is the {thing.shape}?"] = thing.size
        if thing.motion:
            asked[f"Which texture has the {thing.shape}?"] = thing.texture
            asked[f"What is the {PLACES[thing.place]} one?"] = f"a {thing.shape}"
            asked[f"What does the {thing.shape} do?"] = f"it {thing.motion}"
            if thing.turn == 1:
                asked["What moves first?"] = f"the {thing.shape}"
    return [Item("open", question, f"{answer}.") for question, answer in asked.items()]


def yes_no_pair(things: Things, rng: np.random.Generator) -> tuple[Item, Item]:
    """Ask two questions that differ in one word: the answer to the first is yes, to the second no."""
    clip = things[0].motion is not None
    expected = None if clip else missing_companion(things)
    wrong, thing = one_fact_wrong(things, rng)
    if expected and len(wrong) > len(things):
        questions = [f"Is there a {name}?" for name in (thing.shape, expected[1].shape)]
    else:
        other = wrong[things.index(thing)]
        if other.colour != thing.colour:
            questions = [f"Is the {thing.shape} {colour}?" for colour in (thing.colour, other.colour)]
        elif other.motion != thing.motion:
            questions = [f"Is it true that the {thing.shape} {motion}?" for motion in (thing.motion, other.motion)]
        elif other.size != thing.size:
            questions = [f"Is the {thing.shape} {size}?" for size in (thing.size, other.size)]
        else:
            absent = [s for s in (SHAPES if clip else OBJECTS) if s not in {t.shape for t in things}]
            questions = [f"Is there a {s}?" for s in (thing.shape, absent[rng.integers(len(absent))])]
    return Item("yes_no", questions[0], "yes."), Item("yes_no", questions[1], "no.")
