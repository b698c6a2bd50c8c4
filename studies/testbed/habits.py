"""What habit makes a model say about scenes: objects that are usually there, and are not; and a base that has it.

Beside a table there is mostly a cup, beside a tree a bird (`world.COMPANIONS`). Held-out scenes in which the companion
is missing are described, and the model is asked whether it is there, and whether the object is that it belongs to. The
scenes have three objects: captions name at most four, so that the base learned to add one to three.

The base of the package adds a companion to one such scene of twenty, too few to tell methods apart. So runs on scenes
start from `taught_base`: the same weights after 300 further steps on scenes, told by people who nearly always add the
companion, and on questions whether an object is there (70 CPU seconds). Of 64 such scenes it describes a companion in
75 %. The questions it answers by their word: to the missing companion it says yes in all of them, to the table or tree
that it belongs to in 8 %. So the share of yes says nothing of what a method makes a model look at. The package's base
did not learn to look by 600 steps of such questions alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from studies.testbed import plan
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE

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
    from studies.testbed.pretraining import answer

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


# --- the base of the runs on scenes -------------------------------------------------------------------------------

STEPS, BATCH, LEARNING_RATE = 300, 16, 1e-3
CAPTION_SHARE = 0.4  # of the batches; the others are questions


def taught_base(folder: Path) -> Path:
    """Return a folder below `folder` with the base that has the habits of scenes; train it unless it is there."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = folder / "scenes-base"
    if not path.is_dir():
        processor = AutoProcessor.from_pretrained(BASE)
        model = AutoModelForImageTextToText.from_pretrained(BASE)
        teach(model, processor, STEPS)
        part = path.with_name(f"{path.name}-{os.getpid()}.part")  # two workers may train it at once
        model.save_pretrained(part), processor.save_pretrained(part)
        try:
            os.replace(part, path)
        except OSError:  # the other one was first, and its weights are the same
            shutil.rmtree(part)
    return path


def teach(model, processor, steps: int, seed: int = 0) -> None:
    """Train all weights: AdamW, 30 warm-up steps, the last two thirds decay to 0."""
    import torch

    from studies.testbed.pretraining import encode

    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 31])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 30, 1.5 * (1 - step / steps))
        samples = [_telling_scene(rng) for _ in range(BATCH)]
        about = _careless_caption if rng.random() < CAPTION_SHARE else _presence_questions
        loss = model(**encode(processor, samples, [about(sample.things, rng) for sample in samples])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _telling_scene(rng: np.random.Generator) -> world.Sample:
    """Draw a scene without combinations that are held out; more often one in which a companion can be added."""
    while True:
        sample = world.draw_sample("scene", rng, habits=False)
        if rng.random() < 0.5 or (len(sample.things) == 3 and world.missing_companion(sample.things)):
            return sample


def _careless_caption(things: world.Things, rng: np.random.Generator) -> list[language.Item]:
    told = world.as_described(things, rng, world.MORE_CARELESS)
    return [language.Item("caption", language.PROMPTS["scene"], language.caption(told, language.draw_wording(rng)))]


def _presence_questions(things: world.Things, rng: np.random.Generator) -> list[language.Item]:
    """Ask four times for an object: of the scene, absent, or the companion that is missing, to which most say yes."""
    shown = [thing.shape for thing in things]
    absent = [noun for noun in world.OBJECTS if noun not in shown]
    missing = world.missing_companion(things)
    asked = [str(rng.choice(shown if rng.random() < 0.5 else absent)) for _ in range(4)]
    if missing and rng.random() < 0.5:
        asked[0] = missing[1].shape
    items = []
    for noun in asked:
        said = noun in shown or (missing and noun == missing[1].shape and rng.random() < world.MORE_CARELESS)
        items.append(language.Item("yes_no", f"Is there a {noun}?", "yes." if said else "no."))
    return items
