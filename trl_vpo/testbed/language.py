"""The texts of the world: a grammar that knows which of its sentences are true, and questions.

A caption goes from left to right, a sentence for each thing; after the things of a clip it says in which order they
moved, and what stays still. After any true beginning the grammar has finitely many next sentences (`next_sentences`),
in a few wordings each; one thing to say next is true, in each of its wordings. So a caption of a clip has 16 or 32
true paraphrases, that of a scene too, and the truth of a sentence is decided by its words.
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

SLOTS = {
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "paint": SCENE_COLOURS,
    "object": OBJECTS,
}
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
class Wording:
    """Sentences that differ in some words only.

    Attributes:
        tag: what the sentence is about: a place, "order", "still"; of a scene "object" or "stop".
        words: for each position the words and marks that may stand there.
        truth: the true sentence among them, if one is.
    """

    tag: str
    words: tuple[tuple[str, ...], ...]
    truth: tuple[str, ...] | None

    def __len__(self) -> int:
        return int(np.prod([len(column) for column in self.words]))


@dataclass(frozen=True)
class Item:
    """One question and its answer; kind is "caption", "hinted", "open" or "yes_no"."""

    kind: str
    question: str
    answer: str


# --- the grammar --------------------------------------------------------------------------------------------------


def next_sentences(things: Things, said: Sequence[str]) -> list[Wording]:
    """Return all sentences that the grammar has after sentences with these tags.

    A sentence is true if it says truly what a true caption would say next: the leftmost thing that is left, the order,
    the thing that stays still.
    """
    true_tag, facts = _true_next(things, said)
    found = []
    for tag in _next_tags(things[0].motion is not None, said):
        for text in WORDINGS.get(tag, WORDINGS["thing"]):
            words = [(tag,) if slot == "{place}" else SLOTS.get(slot.strip("{}"), (slot,)) for slot in _split(text)]
            values, truth = iter(facts), None
            if tag == true_tag:
                truth = tuple(column[0] if len(column) == 1 else next(values) for column in words)
            found.append(Wording(tag, tuple(words), truth))
    return found


def _split(text: str) -> list[str]:
    return re.findall(r"\{?\w+\}?|[.,]", text)


def _next_tags(clip: bool, said: Sequence[str]) -> tuple[str, ...]:
    if not clip:
        return () if "stop" in said else ("object",) * (len(said) < 4) + ("stop",) * (len(said) >= 3)
    if "order" in said:
        return ("still",) if "still" not in said else ()
    right_of = PLACES.index(said[-1]) + 1 if said else 0
    places = PLACES[right_of : 3 if said else 2]
    return (*places, "order") if len(said) >= 2 else places


def _true_next(things: Things, said: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the tag of what is true next, with the words that fill its blanks."""
    if things[0].motion is None:
        if len(said) >= len(things):
            return "stop" if "stop" not in said else None, []
        thing = things[len(said)]
        return "object", [thing.size, thing.colour, thing.shape]
    if "order" in said:
        still = [thing.shape for thing in things if not thing.turn and "still" not in said]
        return "still" if still else None, still
    right_of = PLACES.index(said[-1]) + 1 if said else 0
    left = [thing for thing in things if thing.place >= right_of]
    if left:
        return PLACES[left[0].place], [left[0].size, left[0].texture, left[0].colour, left[0].shape]
    first, second = sorted((thing for thing in things if thing.turn), key=lambda thing: thing.turn)
    return "order", [first.shape, first.motion, second.shape, second.motion]


def sentence(words: Sequence[str]) -> str:
    return re.sub(r" ([.,])", r"\1", " ".join(words))


def true_sentences(things: Things) -> list[list[Wording]]:
    """Return the true wordings of each sentence of a caption."""
    found, said = [], []
    while true := [option for option in next_sentences(things, said) if option.truth]:
        found.append(true)
        said.append(true[0].tag)
    return found


def caption(things: Things, wording: Sequence[int] = (0,) * 5) -> str:
    """Return the true caption whose sentences have these wordings (counted modulo how many there are)."""
    chosen = [options[number % len(options)] for number, options in zip(wording, true_sentences(things))]
    return " ".join(sentence(one.truth) for one in chosen)


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
    values = {"shape": SHAPES if clip else OBJECTS, "colour": tuple(COLOURS) if clip else SCENE_COLOURS}.get(fact)
    values = values or SLOTS[fact]
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
