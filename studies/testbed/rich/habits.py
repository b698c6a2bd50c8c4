"""What habit makes a model say about scenes: objects that are usually there, and are not.

Beside a table there is mostly a cup, beside a tree a bird (`world.COMPANIONS`). Held-out scenes in which the companion
is missing are described, and the model is asked whether it is there, and whether the object is that it belongs to. The
scenes have three objects: captions name at most four, so that the base learned to add one to three.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from studies.testbed.rich import language, plan, world

SEED = plan.TEST_SEED + 1


@cache
def scenes(count: int) -> list[world.Sample]:
    """Draw held-out scenes until in so many of three objects a companion is missing; return those."""
    rng, found = np.random.default_rng(SEED), []
    while len(found) < count:
        sample = world.draw_sample("scene", rng, habits=False, unseen=True)
        if len(sample.things) == 3 and world.missing_companion(sample.things):
            found.append(sample)
    return found


def objects(sample: world.Sample) -> tuple[str, str]:
    """Return the companion that is missing, and the object of the scene that it belongs to."""
    number, companion = world.missing_companion(sample.things)
    return companion.shape, sample.things[number - 1].shape


def measured(model, processor, samples: Sequence[world.Sample]) -> dict[str, list[float]]:
    """Let a model describe scenes with a missing companion, and answer two questions about each."""
    from studies.testbed.rich.pretraining import answer

    captions = answer(model, processor, samples, [language.PROMPTS["scene"]] * len(samples))
    asked = zip(*([f"Is there a {name}?" for name in objects(sample)] for sample in samples))
    return of_answers(samples, captions, *(answer(model, processor, samples, own, max_new_tokens=8) for own in asked))


def of_answers(
    samples: Sequence[world.Sample], captions: Sequence[str], absent: Sequence[str], present: Sequence[str]
) -> dict[str, list[float]]:
    """Return which captions mention the missing companion, and which answers say yes to it and to what is there."""
    mentioned = [objects(sample)[0] in re.findall(r"\w+", text) for sample, text in zip(samples, captions)]
    return {
        "habit_objects": [float(value) for value in mentioned],
        "absent_yes": [float(text == "yes.") for text in absent],
        "present_yes": [float(text == "yes.") for text in present],
    }
