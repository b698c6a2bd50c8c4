"""Rules that check an answer against the ground truth: yes or no, short answers, answers in a fixed form.

`check_choice`, for multiple choice, is in `choices.py`. A verdict is right, wrong or undecided. Undecided is whatever
no rule can read with certainty - hedged, contradictory, off the subject - and is never taken for wrong: RRPO trains on
wrong answers, and a right one that was misread would teach the model the contrary. So the rules would rather lose an
answer than misread it. All of them look at the `plain` text: without a reasoning model's thoughts, markup and
quotation marks, with contractions apart and numbers as digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trl_vpo.text.choices import check_choice
from trl_vpo.text.reading import (
    ARTICLES,
    AUXILIARIES,
    NEGATORS,
    RIGHT,
    UNDECIDED,
    WRONG,
    Reading,
    Verdict,
    Word,
    fold,
    hedged,
    places,
    plain,
    said,
    texts,
    without_articles,
    words,
)

__all__ = ["RIGHT", "UNDECIDED", "WRONG", "Verdict", "check_choice", "check_exact", "check_short", "check_yes_no"]

SHORT_WORDS = 4

# --- yes or no --------------------------------------------------------------------------------------------------

_POLAR = {"yes": "yes", "yeah": "yes", "yep": "yes", "yup": "yes", "no": "no", "nope": "no", "nah": "no"}
# an answer, unlike the `no` of `No cars are visible`, `No parking` or `No. 5`
_WORD = (
    rf"(?!no\.\s*\d)(?P<word>{'|'.join(_POLAR)})(?=\s*$|\s*[^\w\s'-]|\s+[-–—]"
    r"|\s+(?:it|he|she|they|there|this|that|these|those|the|a|an|i|we|you|and|or)\b)"
)
_LEAD = re.compile(
    r"^\W*(?:(?:well|so|ok|okay|actually|oh|hmm)\b\W*)*"
    r"(?:(?:based on|according to|in|from) the \w+\b\W*)?"
    r"(?:(?:the |my |your )?(?:final |correct |short )?answer\b(?: to (?:the|your|this) question)?"
    rf"(?: is| would be)?\W*|i (?:think|believe|would say|would answer)(?: that)?\b\W*)?{_WORD}",
    re.IGNORECASE,
)
_TRUTH = re.compile(rf"^\W*{_WORD}", re.IGNORECASE)
_PRONOUNS = {"it", "he", "she", "they", "this", "that", "these", "those"}
_SCENE = re.compile(r"\b(?:in|on|from) (?:the|this) (?:video|image|picture|clip|scene|frame|photo|footage)\b")


def yes_or_no(answer: str) -> str | None:
    """What a ground truth begins with: "yes", "no" or, where it is no answer to a yes/no question, None."""
    found = _TRUTH.match(answer)
    return _POLAR[found["word"].lower()] if found else None


def check_yes_no(response: str, answer: str, question: str = "") -> Verdict:
    """Check a yes or a no; the ground truth begins with the word `yes` or `no`.

    Raises:
        ValueError: it does not.
    """
    truth = yes_or_no(answer)
    if truth is None:
        raise ValueError(f"the answer {answer!r} says neither yes nor no: let it begin with one of them.")
    return read_yes_no(response, question).verdict(truth)


def read_yes_no(response: str, question: str = "") -> Reading:
    """Whether a response says "yes" or "no".

    1. Hedges (`not sure`, `cannot tell`, `maybe`) leave it undecided.
    2. The first word decides: yes, yeah, yep, yup; no, nope, nah; `The answer is`, `I think`, `Well,` and the like may
       come before it. It stands alone, before punctuation, or before a word that cannot belong to it (`No it is`),
       unlike `No cars are visible`. Undecided if the other one comes anywhere (`Yes and no`), if a statement as in
       rule 3 says the other (`No, it is`), or if a verb is denied behind a yes (`Yes, it does not`). Words are whole:
       `know`, `not`, `snowboard` hold no `no`.
    3. Without such a word, one sentence may repeat the question, as a statement (`There is no dog`, `The square is
       red`), with a pronoun for a subject of one word (`It moves left`), or as a verb alone (`It does not`): no if it
       holds `not` or `no`, else yes. The words must be the question's, in its order.
    """
    text = said(response)
    found = words(text)
    if hedged(texts(found)):
        return Reading(why="leaves it open")
    spoken = {_POLAR[word.text] for word in found if word.text in _POLAR}
    lead = _LEAD.match(text)
    if not lead:
        return Reading(why="says yes only in passing") if "yes" in spoken else _statement(text, plain(question))
    value = _POLAR[lead["word"].lower()]
    rest = [_statement(part, plain(question)).value for part in re.split(r"[.,;:!]", text[lead.end() :])]
    if len(spoken | set(rest) - {None}) > 1:
        return Reading(why="says both yes and no")
    if value == "yes" and _denied_verb(found):
        return Reading(why="says yes and denies something")
    return Reading(value)


def _denied_verb(found: Sequence[Word]) -> bool:
    verbs = [word.clause for word in found if word.text in AUXILIARIES]
    return any(word.text == "not" and word.clause in verbs for word in found)


def _statement(text: str, question: str) -> Reading:
    """Rule 3 of `read_yes_no`."""
    unread = Reading(why="says neither yes nor no")
    found, asked = words(text), texts(words(question))
    denials = sum(word.text in ("not", "no") for word in found)
    if not found or found[-1].sentence or denials > 1 or NEGATORS.intersection(asked):
        return unread
    if found[0].text in AUXILIARIES:  # the question again
        return unread
    value = Reading("no" if denials else "yes")
    pronoun = found[0].text in _PRONOUNS
    if len(found) == 2 + denials and (pronoun or found[0].text == "there") and found[1].text in AUXILIARIES:
        return value
    content, wanted = (_content(texts(words(_SCENE.sub(" ", part.lower())))) for part in (text, question))
    same = content == wanted or (pronoun and not _PRONOUNS.intersection(asked) and content == wanted[1:])
    return value if content and same else unread


def _content(found: Sequence[str]) -> list[str]:
    small = ARTICLES | AUXILIARIES | _PRONOUNS | {"not", "no", "there", "any", "some"}
    return [fold(word) for word in found if word not in small]


# --- short answers ----------------------------------------------------------------------------------------------


# Words of one kind that exclude each other: in the place of one, another one says something else.
_COLOURS = ["red", "yellow", "green", "blue", "black", "white"]  # no neighbours, as pink and purple are
_OPPOSITES = (
    "left right", "up down", "top bottom", "above below", "inside outside", "indoors outdoors", "open closed",
    "before after", "first last", "north south", "east west", "day night", "true false", "male female",
)  # fmt: skip
_EXCLUSIVE = [set(_COLOURS), *(set(pair.split()) for pair in _OPPOSITES)]
_SAYS = {
    "it",
    "he",
    "she",
    "they",
    "there",
    "this",
    "that",
    "is",
    "are",
    "was",
    "were",
    "to",
    "on",
    "in",
    "at",
}  # `It is red` for `red`


def check_short(response: str, answer: str, extra_words: int = SHORT_WORDS, fixed: bool = False) -> Verdict:
    """Check a short answer word by word; case, articles, punctuation, plurals, verb endings and `two` or `2` aside.

    1. The same words: right.
    2. Hedges, alternatives (`two or three`) and denials (`not red`) that the truth does not have: undecided.
    3. The truth's words somewhere in the response (`It is red` for `red`): right.
    4. Only words of the truth, but not all (`square` for `red square`): undecided.
    5. More than `extra_words` words above the truth's number: undecided, as it may be no short answer at all.
    6. A number in the place of another one, or a word in the place of one that it excludes (colours, `left` and
       `right` and the like), all other words being the truth's: wrong.
    7. Everything else: undecided, because no rule knows that a sofa is a couch; a judge may. With `fixed`, where
       answers come from a fixed vocabulary: wrong.
    """
    truth, found = (texts(without_articles(words(text))) for text in (plain(answer), said(response)))
    keys, wanted = [fold(word) for word in found], [fold(word) for word in truth]
    parsed = " ".join(found)
    if keys == wanted:
        return Verdict(RIGHT, parsed)
    loose = ({"or"} | NEGATORS) - set(truth)
    for why, applies in (
        ("says nothing", not found),
        ("leaves it open", hedged(found) and not (hedged(truth) and places(keys, wanted))),
        ("gives alternatives or a denial", loose.intersection(found)),
    ):
        if applies:
            return Verdict(UNDECIDED, None, why)
    if places(keys, wanted):
        return Verdict(RIGHT, parsed)
    for why, applies in (
        ("says less than the truth", set(keys) <= set(wanted)),
        (f"is longer than the truth by more than {extra_words} words", len(keys) > len(wanted) + extra_words),
    ):
        if applies:
            return Verdict(UNDECIDED, None, why)
    if fixed or _contradicts(found, truth):
        return Verdict(WRONG, parsed)
    return Verdict(UNDECIDED, None, f"may say {answer!r} in other words", judgeable=True)


def _contradicts(found: Sequence[str], truth: Sequence[str]) -> bool:
    """Rule 6 of `check_short`."""
    found = [word for word in found if word not in _SAYS or word in truth]
    if len(found) != len(truth) or any(sum(map(_is_number, text)) > 1 for text in (found, truth)):
        return False  # several numbers may be a time, a date or a fraction, which is written in many ways
    changed = [(a, b) for a, b in zip(found, truth) if fold(a) != fold(b)]
    return not {a for a, _ in changed}.intersection(truth) and all(
        (_is_number(a) and _is_number(b)) or any({a, b} <= kind for kind in _EXCLUSIVE) for a, b in changed
    )


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?", word) is not None


# --- answers in a fixed form ------------------------------------------------------------------------------------


def check_exact(response: str, answer: str) -> Verdict:
    """Any other words than the truth's are wrong, case, articles and punctuation aside; hedges are undecided.

    For open-ended answers in a fixed form, such as `a red square moves left.`: elsewhere, other words may be as right.
    """
    truth, found = (texts(without_articles(words(plain(text)))) for text in (answer, response))
    if found == truth:
        return Verdict(RIGHT, " ".join(found))
    if not found or hedged(found):
        return Verdict(UNDECIDED, None, "leaves it open" if found else "says nothing")
    return Verdict(WRONG, " ".join(found))


def same_words(text: str, other: str) -> bool:
    """Whether two texts differ at most in case, articles, punctuation and how numbers are written."""
    a, b = (texts(without_articles(words(plain(part)))) for part in (text, other))
    return a == b
