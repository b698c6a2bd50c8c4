"""Noun phrases of English text by rules: what a response says can be seen, as names for an object detector.

A tagger with small lists of closed-class words, common caption verbs and adjectives, and suffixes; every word that
none of them knows counts as a noun. A phrase is a run of adjectives and nouns; articles, numbers and adjectives that
nothing can be seen of fall away, and the head becomes singular: "two large brown dogs" gives "large brown dog".

Limits. It reads English only. It does not parse: a verb it does not know may stay in a phrase ("bird flutter"), and
nouns that share a spelling with a listed verb are sometimes lost. Figures of speech, quoted writing and names are
taken at their word. That is good enough to propose candidates, because a detector or an annotation must confirm each
of them; where it is not, give every row its own candidates (`objects_column`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trl_vpo.text import english
from trl_vpo.text.answers import read_yes_no

MAX_WORDS = 4  # of a phrase, counted from its head


@dataclass(frozen=True)
class Candidate:
    """An object that may be critical.

    Attributes:
        text: lower case, without article, singular: "brown dog".
        where: the part of the row that names it.
    """

    text: str
    where: str


def candidates(question: str, response: str) -> list[Candidate]:
    """Noun phrases in LPOI's order: first sentence of the response, question, rest of the response; each text once.

    What the response denies is no candidate: without it in the image, the response would only be truer.
    """
    first, rest = split_first_sentence(response)
    if read_yes_no(response, question).value == "no":
        question = ""
    found: dict[str, Candidate] = {}
    denied = noun_phrases(response, denied=True)
    for where, text in (("first sentence", first), ("question", question), ("rest", rest)):
        for phrase in noun_phrases(text):
            if phrase not in denied:
                found.setdefault(phrase, Candidate(phrase, where))
    return list(found.values())


def split_first_sentence(text: str) -> tuple[str, str]:
    """The first sentence and what follows it. A line's end closes a sentence too; abbreviations do not."""
    text = text.strip()
    for match in re.finditer(r"[.!?]+[\"')\]]*(?=\s|$)|\n", text):
        before = text[: match.start()].split()
        if match.group().startswith(".") and before and before[-1].strip("\"'([").lower() in english.ABBREVIATIONS:
            continue
        return text[: match.end()], text[match.end() :].strip()
    return text, ""


def noun_phrases(text: str, denied: bool = False) -> list[str]:
    """The phrases in the order of the text, repetitions included; with `denied`, those that it says are not there."""
    words = [w.replace("’", "'").lower() for w in _WORD.findall(_TAG.sub(" . ", text))]
    tags: list[str] = []
    for at in range(len(words)):
        tags.append(_tag(words, tags, at))
    phrases, start = [], None
    for at in range(len(words) + 1):
        if start is not None and _ends(words, tags, start, at):
            phrase = _phrase(words, tags, start, at)
            phrases += [phrase] if phrase and _denied(words, start, at) == denied else []
            start = None
        if start is None and at < len(words) and tags[at] in "DJN":
            start = at
    return phrases


_WORD = re.compile(r"[A-Za-zÀ-ÿ]+n['’]t|[A-Za-zÀ-ÿ]+(?:-[A-Za-zÀ-ÿ]+)*|['’](?:s|re|ve|ll|d|m)\b|\d+|[^\sA-Za-zÀ-ÿ\d]")
_BEFORE_PREDICATE = {"very", "quite", "rather", "too", "so", "not", "also", "and", ","}
_TAG = re.compile(r"<[^<>]*>")  # <image> and other markup


# --- tags -------------------------------------------------------------------------------------------------------


def _tag(words: list[str], tags: list[str], at: int) -> str:
    """D determiner or number, J adjective, N noun, V verb, P preposition, C "and" or comma, X all else.

    Closed-class words first; then what is inside a phrase that still waits for its noun is an adjective or a noun,
    and elsewhere known verb forms are verbs.
    """
    word = words[at]
    before = tags[at - 1] if at else "P"
    if word in (",", "and", "&"):
        return "C"
    if word.isdigit() or word in english.DETERMINERS:
        return "X" if word == "that" and before == "N" else "D"  # "the dog that barks"
    if word in english.PREPOSITIONS:
        return "P"
    if word in english.OTHERS or not word[0].isalpha() or (word.endswith("ly") and word not in english.NO_ADVERBS):
        return "X"
    waits, followed = before in "DJ", _content(words, at + 1)
    alone = before == "D" and words[at - 1] in english.STANDALONE  # "one holds a bat": it need not wait for a noun
    if "-" in word and followed and not word.endswith("ing"):  # "a double-decker old bus"
        return "J"
    if word == "light":
        return "J" if words[at + 1 : at + 2] and words[at + 1] in english.ADJECTIVES else "N"
    if word in english.ADJECTIVES:
        return "N" if word == "orange" and before == "D" and not followed else "J"
    if word.endswith("ing") and len(word) > 4 and word not in english.ING_NOUNS:
        if followed and ((waits and not alone) or word in english.ING_MODIFIERS):
            return "J"
        return "N" if before == "D" and not alone else "V"
    if word in english.PAST or (word.endswith("ed") and len(word) > 3 and word not in english.ED_NOUNS):
        return "J" if followed and (waits or before in "PC") else "V"
    if _is_verb(words, tags, at, waits and not alone):
        return "V"
    long = len(word) > 5 and word not in english.ABLE_NOUNS
    return "J" if long and word.endswith(("ful", "ous", "ive", "less", "ish", "able", "ible")) else "N"


def _is_verb(words: list[str], tags: list[str], at: int, waits: bool) -> bool:
    """After a noun the -s form is a verb, and after a plural the plain form: "food stand", but "dogs stand"."""
    word, before = words[at], tags[at - 1] if at else None
    if waits:
        return False
    if before == "N":
        several = english.singular(words[at - 1]) != words[at - 1] or "and" in words[max(0, at - 4) : at]
        if word in english.VERBS or word in english.VERBS_S:
            return several or word in english.VERBS_S
        after = words[at + 1] if at + 1 < len(words) else ""
        return (
            not several and english.singular(word) != word and after in english.DETERMINERS
        )  # "the cat licks its paw"
    return (word in english.VERBS and before != "P") or (word in english.VERBS_S and before not in ("P", "V"))


def _content(words: list[str], at: int) -> bool:
    """Whether the word there can belong to a noun phrase behind a modifier."""
    if at >= len(words) or not words[at][0].isalpha():
        return False
    word = words[at]
    closed = word in english.DETERMINERS or word in english.PREPOSITIONS or word in english.OTHERS or word == "and"
    return not closed and not (word.endswith("ly") and word not in english.NO_ADVERBS)


# --- phrases ----------------------------------------------------------------------------------------------------


def _ends(words: list[str], tags: list[str], start: int, at: int) -> bool:
    """Whether the phrase that begins at `start` is over before position `at`."""
    if at == len(words) or tags[at] in "VPX":
        return True
    if tags[at] == "C":  # "black and white cat", "large, brown dog" go on
        return not (tags[at - 1] == "J" and at + 1 < len(words) and tags[at + 1] == "J")
    return tags[at] in "DJ" and "N" in tags[start:at]


def _phrase(words: list[str], tags: list[str], start: int, end: int) -> str | None:
    """The phrase words[start:end] as a candidate, or None if it names nothing that can be seen."""
    if tags[end - 1] != "N":
        return None
    head = english.singular(words[end - 1])
    if {head, words[end - 1]} & (english.SKIPPED | english.ABBREVIATIONS) or len(head) < 2:
        return None
    if head.endswith(english.ABSTRACT) and head not in english.CONCRETE:
        return None
    if head in english.GATHERERS and words[end : end + 1] == ["of"]:
        return None
    if "D" not in tags[start:end] and head == words[end - 1] and _is_predicate(words, start):
        return None
    pairs = zip(words[start : end - 1], tags[start:end])
    before = [w for w, tag in pairs if (tag in "JN" and w not in english.UNSEEN) or w == "and"]
    before = before[-(MAX_WORDS - 1) :]
    joined = [w for i, w in enumerate(before) if w != "and" or 0 < i < len(before) - 1]
    return " ".join([*joined, head])


def _denied(words: list[str], start: int, end: int) -> bool:
    """ "no dog", "without a dog", "is not a dog", "isn't a dog"."""
    before = words[start - 1] if start else ""
    return "no" in words[start:end] or before in ("not", "without") or before.endswith("n't")


def _is_predicate(words: list[str], start: int) -> bool:
    """ "The cat is asleep": a bare word behind a copula says how something is, except in "there is snow"."""
    at = start - 1
    while at >= 0 and (words[at].endswith("ly") or words[at] in _BEFORE_PREDICATE or words[at] in english.ADJECTIVES):
        at -= 1
    return at >= 0 and words[at] in english.COPULAS and not (at and words[at - 1] == "there")
