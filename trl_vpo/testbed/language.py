"""What can be said about the world: captions, questions with answers, and the check of a caption against the facts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from trl_vpo.testbed.world import COLOURS, MOTIONS, SHAPES, Thing, as_usual

PROMPTS = {"clip": "Describe the video.", "scene": "Describe the image."}
LETTERS = "ABCD"
HINT = "Hint: {answer} {question}"  # a question with its answer given away
REFLECTION = "You said: {first_answer} Hint: {answer} {question}"

_MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: moves ({'|'.join(MOTIONS)}))?\b")
_CAPTION = re.compile(rf"a {_MENTION.pattern}(?: and a {_MENTION.pattern})*\.".replace(r"\b", ""))


@dataclass(frozen=True)
class Item:
    """One question and its answer; kind is "caption", "hinted", "open", "yes_no" or "choice"."""

    kind: str
    question: str
    answer: str


def caption(things: tuple[Thing, ...]) -> str:
    """`a red square moves left.` for a clip, `a red square and a blue circle.` (left to right) for a scene."""
    return " and ".join(f"a {t.name}" + (f" moves {t.motion}" if t.motion else "") for t in things) + "."


def caption_item(things: tuple[Thing, ...]) -> Item:
    return Item("caption", PROMPTS["clip" if things[0].motion else "scene"], caption(things))


def hinted_item(things: tuple[Thing, ...], rng: np.random.Generator) -> Item:
    """The caption asked for with the truth as a hint, in half of the cases behind a false first answer."""
    item = caption_item(things)
    template = REFLECTION if rng.random() < 0.5 else HINT
    asked = template.format(first_answer=wrong_caption(things, rng), answer=item.answer, question=item.question)
    return Item("hinted", asked, item.answer)


def open_items(things: tuple[Thing, ...]) -> list[Item]:
    """The questions with a short answer: colour, shape and motion of a clip; colours and places of a scene."""
    if things[0].motion:
        (thing,) = things
        return [
            Item("open", "What colour is the shape?", f"{thing.colour}."),
            Item("open", "Which shape is it?", f"{thing.shape}."),
            Item("open", "Where does it move?", f"{thing.motion}."),
        ]
    places = [Item("open", f"Which shape is on the {w}?", f"{t.shape}.") for w, t in zip(("left", "right"), things)]
    return places + [Item("open", f"What colour is the {thing.shape}?", f"{thing.colour}.") for thing in things]


def yes_no_pair(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Item, Item]:
    """Two questions that differ in one word: the answer to the first is yes, to the second no.

    The wrong word is what is usual for the shape where that is false, so a model that guesses fails the second.
    """
    thing = things[rng.integers(len(things))]
    wrong, attribute = change_one(thing, rng)
    if attribute == "colour":
        asks = [f"Is the {thing.shape} {t.colour}?" for t in (thing, wrong)]
    elif attribute == "shape":
        absent = [s for s in SHAPES if s not in {t.shape for t in things}]
        asks = [f"Is there a {s}?" for s in (thing.shape, absent[rng.integers(len(absent))])]
    else:
        asks = [f"Does the {thing.shape} move {t.motion}?" for t in (thing, wrong)]
    return Item("yes_no", asks[0], "yes."), Item("yes_no", asks[1], "no.")


def choice_item(things: tuple[Thing, ...], rng: np.random.Generator) -> Item:
    """Four captions, one of them true; the wrong ones change one word each, and the answer is a letter."""
    options = {caption(things)}
    while len(options) < len(LETTERS):
        options.add(wrong_caption(things, rng) if len(options) == 1 else caption(_change_any(things, rng)))
    shuffled = [str(option) for option in rng.permutation(sorted(options))]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, shuffled))
    return Item("choice", f"Which is true? {listed}", f"{LETTERS[shuffled.index(caption(things))]}.")


def is_true(question: str, answer: str, things: tuple[Thing, ...]) -> bool:
    """Return whether an answer to a question about a clip is true, by the facts and not by a rule that reads answers.

    A short answer is true if it names the fact that was asked for, whatever else it says.
    """
    if question in PROMPTS.values():
        return judge_caption(answer, things).exact
    (thing,) = things
    if question.startswith(("Is ", "Does ")):
        claimed = set(re.findall(r"\w+", question)) & {*COLOURS, *SHAPES, *MOTIONS}
        return answer.lower().startswith("yes") == (claimed <= {thing.colour, thing.shape, thing.motion})
    fact = {"What": thing.colour, "Which": thing.shape, "Where": thing.motion}[question.split()[0]]
    return fact in re.findall(r"\w+", answer)


def wrong_caption(things: tuple[Thing, ...], rng: np.random.Generator) -> str:
    """The typical false caption: what is usual, where that is false here, else the truth with one word changed."""
    usual = as_usual(things)
    return caption(usual if usual != things else _change_any(things, rng))


def change_one(thing: Thing, rng: np.random.Generator) -> tuple[Thing, str]:
    """A thing that differs in one attribute, and the attribute's name; towards the usual where that is false."""
    usual = as_usual((thing,))[0]
    if usual != thing:
        return usual, "colour" if usual.colour != thing.colour else "motion"
    choices = {"colour": tuple(COLOURS), "shape": SHAPES} | ({"motion": tuple(MOTIONS)} if thing.motion else {})
    attribute = str(rng.choice(list(choices)))
    others = [value for value in choices[attribute] if value != getattr(thing, attribute)]
    return replace(thing, **{attribute: others[rng.integers(len(others))]}), attribute


def _change_any(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Thing, ...]:
    place = int(rng.integers(len(things)))
    attributes = {"colour": tuple(COLOURS), "shape": SHAPES} | ({"motion": tuple(MOTIONS)} if things[0].motion else {})
    attribute = str(rng.choice(list(attributes)))
    taken = {getattr(thing, attribute) for thing in things}
    others = [value for value in attributes[attribute] if value not in taken]
    changed = replace(things[place], **{attribute: others[rng.integers(len(others))]})
    return (*things[:place], changed, *things[place + 1 :])


@dataclass(frozen=True)
class Verdict:
    """A caption against the facts. `false_words` are the phrases that nothing in the sample supports."""

    parsed: bool
    exact: bool
    false_words: tuple[str, ...]

    @property
    def hallucinated(self) -> bool:
        return bool(self.false_words)


def judge_caption(text: str, things: tuple[Thing, ...]) -> Verdict:
    """Check a generated caption: every `colour shape (moves motion)` in it must belong to a thing of its own.

    A caption outside the grammar is `parsed=False`; what it does mention is judged all the same.
    """
    text = " ".join(text.split())
    left, false_words = list(things), []
    for match in _MENTION.finditer(text):
        colour, shape, motion = match.groups()
        found = next((t for t in left if (t.colour, t.shape) == (colour, shape)), None)
        if found is None:
            false_words.append(f"{colour} {shape}")
            continue
        left.remove(found)
        if motion is not None and motion != found.motion:
            false_words.append(f"moves {motion}")
    return Verdict(_CAPTION.fullmatch(text) is not None, text == caption(things), tuple(false_words))
