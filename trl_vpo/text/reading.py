"""Answers as plain words, and what was read in them: what the rules of `answers.py` and `choices.py` share.

English, as the published data. Scripts without spaces are compared character by character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trl_vpo.text.phrases import split_words

RIGHT, WRONG, UNDECIDED = "right", "wrong", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of an answer.

    Attributes:
        result: RIGHT, WRONG or UNDECIDED.
        parsed: what was read: a letter, "yes" or "no", or the words of a short answer; None where nothing was.
        why: why it is undecided; None otherwise.
        judgeable: it states something else than the truth in words that no rule can compare: a judge can.
    """

    result: str
    parsed: str | None = None
    why: str | None = None
    judgeable: bool = False


@dataclass(frozen=True)
class Reading:
    """What an answer says, or why that cannot be read."""

    value: str | None = None
    why: str | None = None

    def verdict(self, truth: str) -> Verdict:
        if self.value is None:
            return Verdict(UNDECIDED, None, self.why)
        return Verdict(RIGHT if self.value == truth else WRONG, self.value)


ARTICLES = {"a", "an", "the"}
AUXILIARIES = {
    "is", "are", "was", "were", "am", "be", "been", "do", "does", "did", "has", "have", "had", "can", "could", "will",
    "would", "should", "may", "might", "must",
}  # fmt: skip
NEGATORS = {"not", "no", "never", "neither", "nor", "without", "except", "than", "instead"}  # rather than, instead of
_RULED_OUT = {"exclude", "excluding", "eliminate", "eliminating", "rule", "ruling"}
_DENIALS = {"not", "never", "wrong", "incorrect", "false", "ruled", "excluded", "eliminated", "unlikely"}

_CONTRACTIONS = [
    (re.compile(pattern, re.IGNORECASE), plain)
    for pattern, plain in (
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
]
_NUMBERS = {
    "none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 1_000_000}
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse",
}  # fmt: skip

# A response with one of these leaves open what it says. `I think`, `probably`, `it seems` are not among them: who
# says so has chosen.
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


def without_reasoning(response: str, thinking: bool = False) -> str:
    """An answer, stripped, without a reasoning model's thoughts in front of it, up to the last `</think>`.

    Reasoning that never ended leaves an empty answer. Chat templates may put the opening tag into the prompt: with
    `thinking`, a response without the closing one is all thoughts.
    """
    _, closed, text = response.rpartition("</think>")
    text = text.strip()
    return "" if text.startswith("<think>") or (thinking and not closed) else text


# Placeholders of media and what else templates use: `<image>`, `<|vision_start|>`, `<end_of_turn>` and their like.
_CONTROL = re.compile(
    r"<\|[^\s|<>]{1,40}\|>|\[/?(?:INST|IMG(?:_\w+)?)\]"
    r"|</?(?:image|video|img|audio|IMG_CONTEXT|MASK|s|eos|bos|pad|\w+_of_(?:turn|text|image|utterance)"
    r"|(?:image|video)_(?:soft_)?(?:token|pad))>"
)


def unusable(answer: str) -> Failure | None:
    """Return why an answer cannot become a response to train on: it is empty or holds a template's own tokens."""
    if is_blank(answer):
        return Failure("empty answer")
    token = _CONTROL.search(answer)
    return Failure(f"the answer holds {token[0]!r}, a token of templates") if token else None


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends in the tag that opens thoughts."""
    return prompt.rstrip().endswith("<think>")


def plain(response: str) -> str:
    """The response without thoughts, markup and quotation marks, on one line, contractions apart."""
    text = unicodedata.normalize("NFKC", without_reasoning(response)).replace("’", "'")
    text = re.sub(r"\\boxed\s*\{\s*(?:\\text\s*\{)?([^{}]*)\}+", r" answer: \1. ", text)
    text = re.sub(r"[*_`#~$\"“”„«»\\]", " ", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"(?<=[^\s.!?:;,])[ \t]*\n\s*", ". ", text.strip())  # a new line is a new sentence
    for pattern, apart in _CONTRACTIONS:
        text = pattern.sub(apart, text)
    return " ".join(text.split())


def said(response: str) -> str:
    """The `plain` response without questions: neither an echo of what was asked nor `B?` is an answer."""
    return re.sub(r"(?:^|(?<=[.!?]))(?:[^.!?]|\.(?=\d))*\?", " ", plain(response)).strip()


def words(text: str) -> list[Word]:
    """The words of a `plain` text; number words and thousands as digits, no punctuation but signs before numbers."""
    found, clause, sentence, sign = [], 0, 0, ""
    for start, end in split_words(text):
        token = text[start:end].casefold()
        if token == "%":
            token = "percent"
        if any(character.isalnum() for character in token):
            clause += token == "but"
            found.append(Word(sign + _number(token), clause, sentence))
            sign = ""
            continue
        alone = start == 0 or text[start - 1] in " ("
        sign = "-" if token in "-−" and alone and text[end : end + 1].isdigit() else ""
        if sign or (token in "-'" and not alone):
            continue
        clause += 1
        sentence += token in ".!?。！？"
    return _joined_numbers(found)


def without_articles(found: Sequence[Word]) -> list[Word]:
    return [word for word in found if word.text not in ARTICLES]


def texts(found: Sequence[Word]) -> list[str]:
    return [word.text for word in found]


def fold(word: str) -> str:
    """A key under which singular and plural fall together, and the common forms of a verb. Not a word itself."""
    word = _IRREGULAR.get(word.removesuffix("'s"), word.removesuffix("'s"))
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif re.search(r"(?:s|x|z|ch|sh)es$", word):
        word = word[:-2]
    elif len(word) > 3 and re.search(r"[^sui]s$", word):
        word = word[:-1]
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 2 and re.search(r"[aeiouy]", stem):
            word = stem
    word = re.sub(r"([^\W\d_])\1$", r"\1", word)  # running -> runn -> run
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def hedged(found: Sequence[str]) -> bool:
    """Whether these words leave open what is said: `not sure`, `cannot tell`, `maybe`, `either ... or`."""
    return bool(_HEDGE.search(" ".join(found)))


def places(found: Sequence[str], part: Sequence[str]) -> list[int]:
    """Where `part` begins in `found`."""
    return [i for i in range(len(found) - len(part) + 1) if part and list(found[i : i + len(part)]) == list(part)]


def negated(found: Sequence[Word], start: int, end: int) -> bool:
    """Whether the words [start, end) are denied: `I don't think it is B`, `rule out B`, `B is wrong`.

    By any negator before them in the clause, or by a denial among the three words behind them, the first of these
    being an auxiliary.
    """
    clauses = {word.clause for word in found[start:end]}
    before = {word.text for word in found[:start] if word.clause in clauses}
    after = [word.text for word in found[end : end + 3] if word.clause in clauses]
    return bool(
        before & (NEGATORS | _RULED_OUT) or (after and after[0] in AUXILIARIES and _DENIALS.intersection(after))
    )


def _number(token: str) -> str:
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", token):
        token = token.replace(",", "")
    if re.fullmatch(r"\d+\.\d+", token):
        token = token.rstrip("0").rstrip(".")
    return token


def _joined_numbers(found: list[Word]) -> list[Word]:
    """Number words as digits: `twenty-one` -> 21, `two hundred` -> 200, `a dozen` -> 12."""
    joined: list[Word] = []
    number: tuple[int, int] | None = None  # that the last word stands for: (thousands and millions, what is below)
    for word in found:
        grown = _grown(number, word.text) if number and joined[-1].clause == word.clause else None
        if grown:
            joined.pop()
        number = grown or _begun(word.text)
        joined.append(word._replace(text=str(sum(number))) if number else word)
    return joined


def _begun(name: str) -> tuple[int, int] | None:
    if name in _SCALES:
        return (_SCALES[name], 0) if _SCALES[name] >= 1000 else (0, _SCALES[name])
    if name in _NUMBERS or (name.isdecimal() and len(name) < 16):  # int() refuses endless rows of digits
        return 0, _NUMBERS[name] if name in _NUMBERS else int(name)
    return None


def _grown(number: tuple[int, int], name: str) -> tuple[int, int] | None:
    """The number that a further number word makes of a number, or None where it begins one of its own."""
    high, low = number
    if name in _SCALES:
        scale = _SCALES[name]
        if scale >= 1000:
            return (high + low * scale, 0) if low and high % (1000 * scale) == 0 else None
        return (high, low * scale) if 0 < low < 100 else None
    value = _NUMBERS.get(name, 0)
    free = low % 100 == 0 if value >= 10 else low % 10 == 0 and low % 100 != 10
    return (high, low + value) if value and high + low and free else None


@dataclass(frozen=True)
class Failure:
    """In the place of an answer: why there is none."""

    reason: str


def is_blank(text: str) -> bool:
    """Return whether nothing of a text is seen: it is white space, zero-width characters or control characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)
