"""All sentences of the world's captions, true and false.

Behind sentences with given tags the grammar has finitely many next ones (`next_sentences`), in a few wordings each.
The truth of a sentence is decided by its words; the true ones are those of `trl_vpo.testbed.language`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_vpo.testbed.language import true_next, wordings
from trl_vpo.testbed.world import (
    COLOURS,
    MOTIONS,
    OBJECTS,
    PLACES,
    SCENE_COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Things,
)

SLOTS = {
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "paint": SCENE_COLOURS,
    "object": OBJECTS,
}


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


def next_sentences(things: Things, said: Sequence[str]) -> list[Wording]:
    """Return all sentences that the grammar has after sentences with these tags; `true_next` are the true ones."""
    true_tag, facts = true_next(things, said)
    found = []
    for tag in _next_tags(things[0].motion is not None, said):
        for text in wordings(tag):
            slots = re.findall(r"\{?\w+\}?|[.,]", text)
            words = [(tag,) if slot == "{place}" else SLOTS.get(slot.strip("{}"), (slot,)) for slot in slots]
            values, truth = iter(facts), None
            if tag == true_tag:
                truth = tuple(column[0] if len(column) == 1 else next(values) for column in words)
            found.append(Wording(tag, tuple(words), truth))
    return found


def _next_tags(clip: bool, said: Sequence[str]) -> tuple[str, ...]:
    if not clip:
        return () if "stop" in said else ("object",) * (len(said) < 4) + ("stop",) * (len(said) >= 3)
    if "order" in said:
        return ("still",) if "still" not in said else ()
    right_of = PLACES.index(said[-1]) + 1 if said else 0
    places = PLACES[right_of : 3 if said else 2]
    return (*places, "order") if len(said) >= 2 else places


def sentence(words: Sequence[str]) -> str:
    return re.sub(r" ([.,])", r"\1", " ".join(words))
