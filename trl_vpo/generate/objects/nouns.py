"""Noun phrases of English text by rules: what a response says can be seen, as names for an object detector.

A tagger with small lists (`words.yaml`) of closed-class words, common caption verbs and adjectives, and suffixes;
a word that none of them has counts as a noun. A phrase is a run of adjectives and nouns; articles, numbers and
adjectives of nothing visible are dropped, and the head becomes singular: "two large brown dogs" gives "large
brown dog".

Limits. It reads English only. It does not parse: a verb it does not know may stay in a phrase ("bird flutter"), and
nouns that share a spelling with a listed verb are sometimes lost. Figures of speech, quoted writing and names are
taken at their word. That is good enough to propose candidates, because a detector or an annotation must confirm each
of them; otherwise, give every row its own candidates (`objects_column`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

from trl_vpo.text.inflection import plain_verb, singular
from trl_vpo.text.yes_no import read_yes_no

_words = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
lists = SimpleNamespace(**{kind: frozenset(words.split()) for kind, words in _words.items()})
lists.determiners |= lists.standalone
lists.others |= lists.copulas
lists.no_adverbs = lists.ly_nouns | lists.adjectives  # though they end in "ly"
_CLOSED = lists.determiners | lists.prepositions | lists.others | {"and"}
_ABSTRACT = ("tion", "sion", "ness", "ment", "ity", "ance", "ence", "ism", "ship", "hood", "ology", "ability")

MAX_WORDS = 4  # of a phrase, counted from its head
_TAG = re.compile(r"<[^<>]*>")  # <image> and other markup
_WORD = re.compile(r"[A-Za-zÀ-ÿ]+n['’]t|[A-Za-zÀ-ÿ]+(?:-[A-Za-zÀ-ÿ]+)*|['’](?:s|re|ve|ll|d|m)\b|\d+|[^\sA-Za-zÀ-ÿ\d]")
# In tags, one letter for each word (see `_tag`): "black and white cat" and "large, brown dog" are one phrase.
_PHRASE = re.compile(r"(?=[DJN])(?:[DJ]|(?<=J)C(?=J))*N+")
_BEFORE_PREDICATE = {"very", "quite", "rather", "too", "so", "not", "also", "and", ","}


@dataclass(frozen=True)
class Candidate:
    """An object that may be critical."""

    text: str  # lower case, without article, singular: "brown dog"
    where: str  # the part of the row that names it


def candidates(question: str, response: str) -> list[Candidate]:
    """Return noun phrases in LPOI's order, each text once: first sentence of the response, question, its rest.

    Phrases that the response denies are not candidates: hiding them would not make the response wrong.
    """
    first, rest = split_first_sentence(response)
    if read_yes_no(response, question).value == "no":
        question = ""
    by_text: dict[str, Candidate] = {}
    denied = noun_phrases(response, denied=True)
    for where, text in (("first sentence", first), ("question", question), ("rest", rest)):
        for phrase in noun_phrases(text):
            if phrase not in denied:
                by_text.setdefault(phrase, Candidate(phrase, where))
    return list(by_text.values())


def split_first_sentence(text: str) -> tuple[str, str]:
    """Return the first sentence and what follows it. A line's end closes a sentence too; abbreviations do not."""
    text = text.strip()
    for match in re.finditer(r"[.!?]+[\"')\]]*(?=\s|$)|\n", text):
        before = text[: match.start()].split()
        if match.group().startswith(".") and before and before[-1].strip("\"'([").lower() in lists.abbreviations:
            continue
        return text[: match.end()], text[match.end() :].strip()
    return text, ""


def noun_phrases(text: str, denied: bool = False) -> list[str]:
    """Return phrases in the text's order, repetitions included; with `denied`, those that it says are not there."""
    words = [w.replace("’", "'").lower() for w in _WORD.findall(_TAG.sub(" . ", text))]
    tags = ""
    for at in range(len(words)):
        tags += _tag(words, tags, at)
    spans = [match.span() for match in _PHRASE.finditer(tags)]
    phrases = [_phrase(words, tags, *span) for span in spans if _denied(words, *span) == denied]
    return [phrase for phrase in phrases if phrase]


# --- tags -------------------------------------------------------------------------------------------------------


def _tag(words: list[str], tags: str, at: int) -> str:
    """Return D determiner or number, J adjective, N noun, V verb, P preposition, C "and" or comma, X all else.

    Closed-class words first; then what is inside a phrase that still waits for its noun is an adjective or a noun,
    and elsewhere listed verb forms are verbs.
    """
    word = words[at]
    before = tags[at - 1] if at else "P"
    if word in (",", "and", "&"):
        return "C"
    if word.isdigit() or word in lists.determiners:
        return "X" if word == "that" and before == "N" else "D"  # "the dog that barks"
    if word in lists.prepositions:
        return "P"
    if word in lists.others or not word[0].isalpha() or _is_adverb(word):
        return "X"
    after = words[at + 1] if at + 1 < len(words) else "."
    waits, followed = before in "DJ", after[0].isalpha() and not _is_adverb(after) and after not in _CLOSED
    alone = before == "D" and words[at - 1] in lists.standalone  # "one holds a bat": it need not wait for a noun
    if "-" in word and followed and not word.endswith("ing"):  # "a double-decker old bus"
        return "J"
    if word == "light":
        return "J" if after in lists.adjectives else "N"
    if word in lists.adjectives:
        return "N" if word == "orange" and before == "D" and not followed else "J"
    if word.endswith("ing") and len(word) > 4 and word not in lists.ing_nouns:
        if followed and ((waits and not alone) or word in lists.ing_modifiers):
            return "J"
        return "N" if before == "D" and not alone else "V"
    if word in lists.past or (word.endswith("ed") and len(word) > 3 and word not in lists.ed_nouns):
        return "J" if followed and (waits or before in "PC") else "V"
    if (not waits or alone) and _is_verb(words, tags, at):
        return "V"
    long = len(word) > 5 and word not in lists.able_nouns
    return "J" if long and word.endswith(("ful", "ous", "ive", "less", "ish", "able", "ible")) else "N"


def _is_verb(words: list[str], tags: str, at: int) -> bool:
    """Return whether a word is a verb: after a noun the -s form is, after a plural the plain one ("dogs stand")."""
    word, before = words[at], tags[at - 1] if at else None
    plain = word in lists.verbs
    s_form = not plain and plain_verb(word) in lists.verbs
    if before != "N":
        return (plain and before != "P") or (s_form and before not in ("P", "V"))
    several = singular(words[at - 1]) != words[at - 1] or "and" in words[max(0, at - 4) : at]
    if plain or s_form:
        return several or s_form
    after = words[at + 1] if at + 1 < len(words) else ""
    return not several and plain_verb(word) != word and after in lists.determiners  # "the cat licks its paw"


def _is_adverb(word: str) -> bool:
    return word.endswith("ly") and word not in lists.no_adverbs


# --- phrases ----------------------------------------------------------------------------------------------------


def _phrase(words: list[str], tags: str, start: int, end: int) -> str | None:
    """Return the phrase words[start:end] as a candidate, or None if it names nothing that can be seen."""
    head = singular(words[end - 1])
    if {head, words[end - 1]} & (lists.skipped | lists.abbreviations) or len(head) < 2:
        return None
    if head.endswith(_ABSTRACT) and head not in lists.concrete:
        return None
    if head in lists.gatherers and words[end : end + 1] == ["of"]:
        return None
    if "D" not in tags[start:end] and head == words[end - 1]:  # how something is: "the cat is asleep"
        at, passed = start - 1, _BEFORE_PREDICATE | lists.adjectives
        while at >= 0 and (words[at].endswith("ly") or words[at] in passed):
            at -= 1
        if at >= 0 and words[at] in lists.copulas and not (at and words[at - 1] == "there"):  # "there is snow"
            return None
    pairs = zip(words[start : end - 1], tags[start:end])
    before = [w for w, tag in pairs if (tag in "JN" and w not in lists.unseen) or w == "and"]
    before = before[-(MAX_WORDS - 1) :]
    joined = [w for i, w in enumerate(before) if w != "and" or 0 < i < len(before) - 1]
    return " ".join([*joined, head])


def _denied(words: list[str], start: int, end: int) -> bool:
    """Return whether a phrase is not there: "no dog", "without a dog", "is not a dog", "isn't a dog"."""
    before = words[start - 1] if start else ""
    return "no" in words[start:end] or before in ("not", "without") or before.endswith("n't")
