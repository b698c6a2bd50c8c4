"""Check answers against the ground truth: short answers and answers in a fixed form.

`yes_no.py` reads yes/no answers, `choices.py` multiple choice. A check returns right, wrong or undecided. An answer
that no rule can read with certainty (hedged, contradictory, off the subject) is undecided, never wrong: RRPO trains on
wrong answers, and a right one that was misread would teach the model the opposite. All rules compare the words of
`normalize.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trl_vpo.text.inflection import stem
from trl_vpo.text.normalize import NEGATORS, content_words, hedged, normalize, places, statement

RIGHT, WRONG, UNDECIDED = "right", "wrong", "undecided"
SHORT_WORDS = 4


@dataclass(frozen=True)
class AnswerCheck:
    """The result of checking an answer by a rule."""

    result: str  # RIGHT, WRONG or UNDECIDED
    parsed: str | None = None  # what was read: a letter, "yes" or "no", or the words of a short answer
    why: str | None = None  # why it is undecided
    judgeable: bool = False  # its words differ from the truth's, and a judge can compare them, but no rule


@dataclass(frozen=True)
class Reading:
    """The value that an answer states, or why that cannot be read."""

    value: str | None = None
    why: str | None = None

    def check(self, truth: str) -> AnswerCheck:
        if self.value is None:
            return AnswerCheck(UNDECIDED, None, self.why)
        return AnswerCheck(RIGHT if self.value == truth else WRONG, self.value)


# Words that exclude each other: another word of the same set says something else.
_KINDS = [
    set(kind.split())
    for kind in (
        "red yellow green blue black white",  # no similar colours, such as pink and purple
        "left right", "up down", "top bottom", "above below", "inside outside", "indoors outdoors", "open closed",
        "before after", "first last", "north south", "east west", "day night", "true false", "male female",
    )
]  # fmt: skip
# As in `It is red` for `red`.
_AROUND = {"it", "he", "she", "they", "there", "this", "that", "is", "are", "was", "were", "to", "on", "in", "at"}


def check_short(response: str, answer: str, extra_words: int = SHORT_WORDS, fixed: bool = False) -> AnswerCheck:
    """Check a short answer by its words, ignoring case, articles, punctuation, plurals, verb endings and numerals.

    1. The same words: right.
    2. Hedges, alternatives (`two or three`) and denials (`not red`) that the truth does not have: undecided.
    3. The truth's words somewhere in the response (`It is red` for `red`): right.
    4. Only words of the truth, but not all (`square` for `red square`): undecided.
    5. More than `extra_words` words above the truth's number: undecided, as it may not be a short answer at all.
    6. The truth's words, but with another number, or another word of a set whose words exclude each other (colours,
       `left` and `right`): wrong.
    7. Everything else: undecided, because no rule knows that a sofa is a couch; a judge may. With `fixed` (answers
       come from a fixed vocabulary): wrong.
    """
    truth, words = content_words(normalize(answer)), content_words(statement(response))
    truth_keys, keys = [stem(word) for word in truth], [stem(word) for word in words]
    parsed = " ".join(words)
    holds_truth = bool(places(keys, truth_keys))
    if keys == truth_keys:
        return AnswerCheck(RIGHT, parsed)
    if not words:
        why = "says nothing"
    elif hedged(words) and not (hedged(truth) and holds_truth):
        why = "leaves it open"
    elif ({"or"} | NEGATORS).difference(truth).intersection(words):
        why = "gives alternatives or a denial"
    elif holds_truth:
        return AnswerCheck(RIGHT, parsed)
    elif set(keys) <= set(truth_keys):
        why = "says less than the truth"
    elif len(keys) > len(truth_keys) + extra_words:
        why = f"is longer than the truth by more than {extra_words} words"
    elif fixed or _contradicts(words, truth):
        return AnswerCheck(WRONG, parsed)
    else:
        return AnswerCheck(UNDECIDED, None, f"may say {answer!r} in other words", judgeable=True)
    return AnswerCheck(UNDECIDED, None, why)


def _contradicts(words: Sequence[str], truth: Sequence[str]) -> bool:
    """Apply rule 6 of `check_short`."""
    words = [word for word in words if word not in _AROUND or word in truth]
    numbers = [list(filter(re.compile(r"-?\d+(?:\.\d+)?").fullmatch, text)) for text in (words, truth)]
    if len(words) != len(truth) or max(map(len, numbers)) > 1:
        return False  # several numbers may be a time, a date or a fraction, which is written in many ways
    changed = [{a, b} for a, b in zip(words, truth) if stem(a) != stem(b)]
    others = set(words).difference(truth)
    kinds = [*_KINDS, {number for text in numbers for number in text}]
    return all(pair & others and any(pair <= kind for kind in kinds) for pair in changed)


def check_exact(response: str, answer: str) -> AnswerCheck:
    """Check an answer in a fixed form: the truth's words up to case, articles and punctuation, or it is wrong."""
    truth, words = content_words(normalize(answer)), content_words(normalize(response))
    if words == truth:
        return AnswerCheck(RIGHT, " ".join(words))
    if not words or hedged(words):
        return AnswerCheck(UNDECIDED, None, "leaves it open" if words else "says nothing")
    return AnswerCheck(WRONG, " ".join(words))
