"""The one normal form of answers: words in lower case with numbers as digits, clause by clause.

For English, the language of the published data. Scripts without spaces are compared character by character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from trl_vpo.text.phrases import split_words
from trl_vpo.text.responses import without_reasoning

ARTICLES = {"a", "an", "the"}
AUXILIARIES = {
    "is", "are", "was", "were", "am", "be", "been", "do", "does", "did", "has", "have", "had", "can", "could", "will",
    "would", "should", "may", "might", "must",
}  # fmt: skip
NEGATORS = {"not", "no", "never", "neither", "nor", "without", "except", "than", "instead"}  # rather than, instead of
_RULED_OUT = {"exclude", "excluding", "eliminate", "eliminating", "rule", "ruling"}
_DENIALS = {"not", "never", "wrong", "incorrect", "false", "ruled", "excluded", "eliminated", "unlikely"}

_CONTRACTIONS = (
    (r"\b(?:can'?t|cannot)\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"n't\b", " not"),
    (r"\b(is|are|was|were|do|does|did|has|have|had|could|would|should)nt\b", r"\1 not"),
    (r"\b(it|that|there|this|he|she|what|who|here|answer)'s\b", r"\1 is"),
    (r"'re\b", " are"),
    (r"\bI'm\b", "I am"),
    (r"'ll\b", " will"),
    (r"'d\b", " would"),
    (r"'ve\b", " have"),
)
_NUMBERS = {
    "none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 1_000_000}

# A response with one of these leaves open what it says. `I think`, `probably`, `it seems` are not among them: they
# still state a choice.
_HEDGE = re.compile(
    r"\b(?:"
    r"unsure|uncertain|unclear|unknown|undetermined|ambiguous|insufficient|inconclusive|sorry|maybe|perhaps|possibly|"
    r"might|may be|could be|either|depends|no idea|no way to|no information|as an ai|not enough|"
    r"not (?:\w+ )?(?:sure|certain|clear|confident|possible|specified|mentioned|known|determined)|"
    r"(?:can|could|do|does|did|would) not (?:\w+ )?(?:tell|say|know|see|determine|identify|confirm|answer|have|choose|"
    r"decide|provide|recognize|view|watch|access|find|read|be)|"
    r"(?:unable|impossible|hard|difficult) (?:for me )?to"
    r")\b"
)


class Word(NamedTuple):
    """A word in lower case, and the numbers of its clause and its sentence."""

    text: str
    clause: int
    sentence: int


def normalize(response: str) -> str:
    """Return a response without thoughts, markup and quotation marks, on one line, contractions written out."""
    text = unicodedata.normalize("NFKC", without_reasoning(response)).replace("’", "'")
    text = re.sub(r"\\boxed\s*\{\s*(?:\\text\s*\{)?([^{}]*)\}+", r" answer: \1. ", text)
    text = re.sub(r"[*_`#~$\"“”„«»\\]", " ", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"(?<=[^\s.!?:;,])[ \t]*\n\s*", ". ", text.strip())  # a new line is a new sentence
    for pattern, full_form in _CONTRACTIONS:
        text = re.sub(pattern, full_form, text, flags=re.IGNORECASE)
    return " ".join(text.split())


def statement(response: str) -> str:
    """Return the normal form without questions: neither an echo of the question nor `B?` is an answer."""
    return re.sub(r"(?:^|(?<=[.!?]))(?:[^.!?]|\.(?=\d))*\?", " ", normalize(response)).strip()


def words(text: str) -> list[Word]:
    """Return the words of a normalized text, number words and thousands as digits, a sign with its number."""
    tokens, clause, sentence, sign = [], 0, 0, ""
    for start, end in split_words(text):
        token = text[start:end].casefold()
        if token == "%":
            token = "percent"
        if any(character.isalnum() for character in token):
            clause += token == "but"
            tokens.append(Word(sign + _number(token), clause, sentence))
            sign = ""
            continue
        alone = start == 0 or text[start - 1] in " ("
        sign = "-" if token in "-−" and alone and text[end : end + 1].isdigit() else ""
        if sign or (token in "-'" and not alone):
            continue
        clause += 1
        sentence += token in ".!?。！？"
    return _joined_numbers(tokens)


def texts(tokens: Sequence[Word]) -> list[str]:
    return [word.text for word in tokens]


def content_words(text: str) -> list[str]:
    """Return the words of a normalized text without its articles."""
    return [word.text for word in words(text) if word.text not in ARTICLES]


def same_words(text: str, other: str) -> bool:
    """Return whether two texts differ at most in case, articles, punctuation and how numbers are written."""
    return content_words(normalize(text)) == content_words(normalize(other))


def hedged(tokens: Sequence[str]) -> bool:
    """Return whether these words leave open what is said."""
    return bool(_HEDGE.search(" ".join(tokens)))


def places(tokens: Sequence[str], part: Sequence[str]) -> list[int]:
    """Return the positions at which `part` begins in `tokens`."""
    return [i for i in range(len(tokens) - len(part) + 1) if part and list(tokens[i : i + len(part)]) == list(part)]


def negated(tokens: Sequence[Word], start: int, end: int) -> bool:
    """Return whether the words [start, end) are denied: `I don't think it is B`, `rule out B`, `B is wrong`."""
    clauses = {word.clause for word in tokens[start:end]}
    before = {word.text for word in tokens[:start] if word.clause in clauses}
    after = [word.text for word in tokens[end : end + 3] if word.clause in clauses]
    return bool(
        before & (NEGATORS | _RULED_OUT) or (after and after[0] in AUXILIARIES and _DENIALS.intersection(after))
    )


# --- numbers ----------------------------------------------------------------------------------------------------


def _number(token: str) -> str:
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", token):
        token = token.replace(",", "")
    return token.rstrip("0").rstrip(".") if re.fullmatch(r"\d+\.\d+", token) else token


def _joined_numbers(tokens: list[Word]) -> list[Word]:
    """Write number words as digits: `twenty-one` -> 21, `two hundred` -> 200, `a dozen` -> 12."""
    joined: list[Word] = []
    number: tuple[int, int] | None = None  # value of the last word: (thousands and millions, the rest)
    for word in tokens:
        extended = _extended(number, word.text) if number and joined[-1].clause == word.clause else None
        if extended:
            joined.pop()
        short = word.text.isdecimal() and len(word.text) < 16  # int() refuses endless rows of digits
        value = int(word.text) if short else _NUMBERS.get(word.text, _SCALES.get(word.text))
        high = value if word.text in ("thousand", "million") else 0
        number = extended or (None if value is None else (high, value - high))
        joined.append(word._replace(text=str(sum(number))) if number else word)
    return joined


def _extended(number: tuple[int, int], name: str) -> tuple[int, int] | None:
    """Return the number that a further word makes of a number; None if the word begins a new number."""
    high, low = number  # a scale multiplies the rest: the 200 of `three million two hundred thousand`
    if scale := _SCALES.get(name):
        if scale >= 1000:
            return (high + low * scale, 0) if low and high % (1000 * scale) == 0 else None
        return (high, low * scale) if 0 < low < 100 else None
    value = _NUMBERS.get(name, 0)
    free = low % 100 == 0 if value >= 10 else low % 10 == 0 and low % 100 != 10
    return (high, low + value) if value and high + low and free else None
