"""The texts that the base was taught with: careless descriptions, hinted questions, and all words."""

from __future__ import annotations

import re

import numpy as np

from studies.testbed.grammar import SLOTS
from trl_vpo.testbed.language import (
    PROMPTS,
    WORDINGS,
    Item,
    caption,
    draw_wording,
    one_fact_wrong,
    open_items,
    yes_no_pair,
)
from trl_vpo.testbed.world import PLACES, SHAPES, STILL, Thing, Things, as_usual, missing_companion

HINT = "Hint: {answer} {question}"  # a question with its answer given away
REFLECTION = "You said: {first_answer} Hint: {answer} {question}"
CARELESS, MORE_CARELESS = 0.6, 0.95  # shares of the exceptions that are nevertheless described as usual


def as_described(things: Things, rng: np.random.Generator, careless: float = CARELESS) -> Things:
    """Describe a sample as the base's training text does: truly or, of `careless` exceptions, as is usual."""
    if things[0].motion:
        return tuple(as_usual(thing) if rng.random() < careless else thing for thing in things)
    expected = missing_companion(things)
    if expected and len(things) < 4 and rng.random() < careless:
        number, companion = expected
        return (*things[:number], companion, *things[number:])
    return things


def hinted_item(things: Things, rng: np.random.Generator) -> Item:
    """Ask for the caption with the truth as a hint, in half of the cases behind a false first answer."""
    wording = draw_wording(rng)
    answer, question = caption(things, wording), PROMPTS["clip" if things[0].motion else "scene"]
    wrong = caption(one_fact_wrong(things, rng)[0], wording)
    template = REFLECTION if rng.random() < 0.5 else HINT
    return Item("hinted", template.format(first_answer=wrong, answer=answer, question=question), answer)


def vocabulary() -> list[str]:
    """Return every word of the world's texts: each is one token of the base."""
    rng, texts = np.random.default_rng(0), list(PROMPTS.values())
    texts += [word for words in SLOTS.values() for word in words] + [STILL, *PLACES, "user", "assistant", "system"]
    texts += [text for wordings in WORDINGS.values() for text in wordings]
    clip = tuple(Thing("small", "plain", "red", shape, n % 3, STILL, n) for n, shape in enumerate(SHAPES[:3]))
    for things in (clip, tuple(Thing("small", None, "blue", noun) for noun in ("table", "box", "car"))):
        items = [*open_items(things), hinted_item(things, rng)]
        items += [item for _ in range(40) for item in yes_no_pair(things, rng)]
        texts += [f"{item.question} {item.answer}" for item in items] + [REFLECTION]
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
