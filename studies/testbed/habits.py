"""What habit makes a model say about scenes: objects that are usually there, and are not; and a base that has it.

Beside a table there is mostly a cup, beside a tree a bird (`world.COMPANIONS`). Held-out scenes in which the companion
is missing are described, and the model is asked whether it is there, whether the object is that it belongs to, and
whether another is that nobody expects. The scenes have three objects: captions name at most four, so that the base
learned to add one to three.

The base of the package adds a companion to one such scene of twenty, too few to tell methods apart, and says no to
nearly every question. So runs on scenes start from SCENES_BASE: the same weights after 850 further steps. It first
learns to look: whether an object is there, in scenes of one object, then of two, then of three or four, truthfully. In
scenes of three or four alone it did not learn that in 600 steps. Then people tell it what is usual: captions nearly
always add the companion, and 60 % of the answers about a missing one say yes.

    python -m studies.testbed.habits --out FOLDER

trains such a base. The stored one was trained by the same steps in the process of a study, in its portable arithmetic,
in 7 minutes of CPU time of one thread. It is stored because training all weights is not the same on every machine: on
another one it gave a base with the same habits and other log-probs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from studies.testbed import lessons, plan
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE

SCENES_BASE = Path(__file__).parent / "scenes_base"
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


def unexpected(sample: world.Sample, number: int) -> str:
    """Return an object that is not in a scene and that no habit expects there; the number says which of them."""
    shown = [thing.shape for thing in sample.things]
    expected = [companion for owner, (_, companion) in world.COMPANIONS.items() if owner in shown]
    absent = [noun for noun in world.OBJECTS if noun not in (*shown, *expected)]
    return absent[number % len(absent)]


def measured(model, processor, samples: Sequence[world.Sample]) -> dict[str, list[float]]:
    """Let a model describe scenes with a missing companion, and answer three questions about each."""
    from studies.testbed.pretraining import answer

    captions = answer(model, processor, samples, [language.PROMPTS["scene"]] * len(samples))
    nouns = [(*objects(sample), unexpected(sample, number)) for number, sample in enumerate(samples)]
    asked = [[f"Is there a {noun}?" for noun in column] for column in zip(*nouns)]
    return of_answers(samples, captions, *(answer(model, processor, samples, own, max_new_tokens=8) for own in asked))


def of_answers(
    samples: Sequence[world.Sample],
    captions: Sequence[str],
    companion: Sequence[str],
    present: Sequence[str],
    other: Sequence[str],
) -> dict[str, list[float]]:
    """Return which captions mention the missing companion, and which answers say yes.

    `absent_yes` is to the missing companion, `present_yes` to what is there, `other_yes` to what nobody expects.
    """
    mentioned = [objects(sample)[0] in re.findall(r"\w+", text) for sample, text in zip(samples, captions)]
    answers = {"absent_yes": companion, "present_yes": present, "other_yes": other}
    said = {name: [float(text == "yes.") for text in own] for name, own in answers.items()}
    return {"habit_objects": [float(value) for value in mentioned]} | said


# --- the base of the runs on scenes -------------------------------------------------------------------------------

BATCH, LEARNING_RATE = 16, 1e-3
LOOKING = {120: 1, 220: 2, 450: 4}  # until which step it looks at scenes of at most so many objects
STEPS = 850  # in the rest people tell it what is usual
SHARES = {"scene": 0.4, "clip": 0.1, "questions": 0.5}  # of the latter's batches: captions of two kinds, questions
QUESTIONS = 6  # about one scene


def teach(model, processor, steps: int, seed: int = 0) -> None:
    """Train all weights: AdamW, 30 warm-up steps, the last third decays to 0."""
    import torch

    from studies.testbed.pretraining import encode

    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 31])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 30, 3 * (1 - step / steps))
        samples, items = _lesson(step, rng)
        loss = model(**encode(processor, samples, items)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _lesson(step: int, rng: np.random.Generator) -> tuple[list[world.Sample], list[list[language.Item]]]:
    """Return the samples of a step, and what is asked of each."""
    most = next((most for end, most in LOOKING.items() if step < end), None)
    if most:
        samples = [world.draw_sample("scene", rng, habits=False, most=most) for _ in range(2 * BATCH)]
        return samples, [_presence_questions(sample.things, rng) for sample in samples]
    lesson = rng.choice(list(SHARES), p=list(SHARES.values()))
    if lesson == "clip":  # so that it does not forget them
        samples = [world.draw_sample("clip", rng, habits=True) for _ in range(BATCH)]
        return samples, [_caption(sample.things, rng, lessons.CARELESS) for sample in samples]
    samples = [_telling_scene(rng) for _ in range(BATCH)]
    if lesson == "scene":
        return samples, [_caption(sample.things, rng, lessons.MORE_CARELESS) for sample in samples]
    return samples, [_presence_questions(sample.things, rng, lessons.CARELESS) for sample in samples]


def _telling_scene(rng: np.random.Generator) -> world.Sample:
    """Draw a scene without combinations that are held out; more often one in which a companion can be added."""
    while True:
        sample = world.draw_sample("scene", rng, habits=False)
        if rng.random() < 0.5 or (len(sample.things) == 3 and world.missing_companion(sample.things)):
            return sample


def _caption(things: world.Things, rng: np.random.Generator, careless: float) -> list[language.Item]:
    told = lessons.as_described(things, rng, careless)
    prompt = language.PROMPTS["clip" if things[0].motion else "scene"]
    return [language.Item("caption", prompt, language.caption(told, language.draw_wording(rng)))]


def _presence_questions(things: world.Things, rng: np.random.Generator, careless: float = 0.0) -> list[language.Item]:
    """Ask for objects: of the scene, absent, or the companion that is missing, to which the careless say yes."""
    shown = [thing.shape for thing in things]
    absent = [noun for noun in world.OBJECTS if noun not in shown]
    missing = world.missing_companion(things)
    asked = [str(rng.choice(shown if rng.random() < 0.5 else absent)) for _ in range(QUESTIONS)]
    if missing and careless and rng.random() < 0.5:
        asked[0] = missing[1].shape
    items = []
    for noun in asked:
        said = noun in shown or (missing and noun == missing[1].shape and rng.random() < careless)
        items.append(language.Item("yes_no", f"Is there a {noun}?", "yes." if said else "no."))
    return items


def main(argv: Sequence[str] | None = None) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(description="Train the base of the runs on scenes again.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, configuration and processor")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    processor = AutoProcessor.from_pretrained(BASE)
    teach(model, processor, STEPS)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
