"""The texts of the world: captions, questions with answers, and the check of a caption against the facts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from trl_vpo.testbed.world import COLOURS, MOTIONS, SHAPES, Thing, as_usual

PROMPTS = {"clip": "Describe the video.", "scene": "Describe the image."}

_MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: moves ({'|'.join(MOTIONS)}))?\b")
_CAPTION = re.compile(rf"a {_MENTION.pattern}(?: and a {_MENTION.pattern})*\.".replace(r"\b", ""))


@dataclass(frozen=True)
class Item:
    """One question and its answer; kind is "caption", "hinted", "open" or "yes_no"."""

    kind: str
    question: str
    answer: str


# --- questions and answers ----------------------------------------------------------------------------------------


def caption(things: tuple[Thing, ...]) -> str:
    """Return `a red square moves left.` for a clip, `a red square and a blue circle.` (left to right) for a scene."""
    return " and ".join(f"a {t.name}" + (f" moves {t.motion}" if t.motion else "") for t in things) + "."


def caption_item(things: tuple[Thing, ...]) -> Item:
    return Item("caption", PROMPTS["clip" if things[0].motion else "scene"], caption(things))


def open_items(things: tuple[Thing, ...]) -> list[Item]:
    """Ask for short answers: colour, shape and motion of a clip; colours and places of a scene."""
    if things[0].motion:
        (thing,) = things
        answers = {
            "What colour is the shape?": thing.colour,
            "Which shape is it?": thing.shape,
            "Where does it move?": thing.motion,
        }
    else:
        answers = {f"Which shape is on the {w}?": t.shape for w, t in zip(("left", "right"), things)}
        answers |= {f"What colour is the {t.shape}?": t.colour for t in things}
    return [Item("open", question, f"{answer}.") for question, answer in answers.items()]


def yes_no_pair(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Item, Item]:
    """Ask two questions that differ in one word: the answer to the first is yes, to the second no.

    The wrong word is the usual one for the shape if that is false, so a model that guesses fails the second.
    """
    thing = things[rng.integers(len(things))]
    (wrong,) = as_usual((thing,))
    attribute = "colour" if wrong.colour != thing.colour else "motion"
    if wrong == thing:
        wrong, attribute = _change(thing, rng, (thing,))
    if attribute == "colour":
        questions = [f"Is the {thing.shape} {t.colour}?" for t in (thing, wrong)]
    elif attribute == "motion":
        questions = [f"Does the {thing.shape} move {t.motion}?" for t in (thing, wrong)]
    else:
        absent = [s for s in SHAPES if s not in {t.shape for t in things}]
        questions = [f"Is there a {s}?" for s in (thing.shape, absent[rng.integers(len(absent))])]
    return Item("yes_no", questions[0], "yes."), Item("yes_no", questions[1], "no.")


# --- what is false ------------------------------------------------------------------------------------------------


def wrong_caption(things: tuple[Thing, ...], rng: np.random.Generator) -> str:
    """Return the typical false caption: the usual one if it is false here, else the truth with one word changed."""
    wrong = as_usual(things)
    if wrong == things:
        place = int(rng.integers(len(things)))
        wrong = (*things[:place], _change(things[place], rng, things)[0], *things[place + 1 :])
    return caption(wrong)


def _change(thing: Thing, rng: np.random.Generator, others: tuple[Thing, ...]) -> tuple[Thing, str]:
    """Change an attribute to a value that none of the others has."""
    choices = {"colour": tuple(COLOURS), "shape": SHAPES} | ({"motion": tuple(MOTIONS)} if thing.motion else {})
    attribute = str(rng.choice(list(choices)))
    taken = {getattr(other, attribute) for other in others}
    free = [value for value in choices[attribute] if value not in taken]
    return replace(thing, **{attribute: free[rng.integers(len(free))]}), attribute


# --- what is true -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionCheck:
    """A caption against the facts. `false_words` are the phrases that nothing in the sample supports."""

    parsed: bool  # it is a sentence of the world's grammar
    exact: bool
    false_words: tuple[str, ...]

    @property
    def hallucinated(self) -> bool:
        return bool(self.false_words)


def objects_of(things: tuple[Thing, ...]) -> list[str]:
    """Return what a caption may mention: `red square`, and of a clip `moves left`."""
    return [name for t in things for name in (t.name, f"moves {t.motion}" if t.motion else None) if name]


def all_objects() -> list[str]:
    """Return everything that captions of the world can mention."""
    return [f"{c} {s}" for c in COLOURS for s in SHAPES] + [f"moves {motion}" for motion in MOTIONS]


def check_caption(text: str, things: tuple[Thing, ...]) -> CaptionCheck:
    """Check a caption, also one outside the grammar: every `colour shape (moves motion)` needs a thing of its own."""
    text = " ".join(text.split())
    unmatched, false_words = list(things), []
    for colour, shape, motion in (match.groups() for match in _MENTION.finditer(text)):
        thing = next((t for t in unmatched if (t.colour, t.shape) == (colour, shape)), None)
        if thing is None:
            false_words.append(f"{colour} {shape}")
            continue
        unmatched.remove(thing)
        if motion is not None and motion != thing.motion:
            false_words.append(f"moves {motion}")
    return CaptionCheck(_CAPTION.fullmatch(text) is not None, text == caption(things), tuple(false_words))
