"""Singular, plural and stem of English words, by the dictionary and the rules of `lemminflect`.

The library loads its data at the first word, which takes a second.
"""

from __future__ import annotations

import re
from functools import cache

# Corrections of the dictionary's first form and of its rules.
_SINGULAR = {
    "people": "person", "leaves": "leaf", "axes": "axe", "oxen": "ox", "selfies": "selfie", "hoodies": "hoodie",
    "smoothies": "smoothie", "veggies": "veggie",
}  # fmt: skip
_PLURAL = {"person": {"people", "persons"}, "ox": {"oxen"}}
NO_SINGULAR = {
    "glasses", "sunglasses", "eyeglasses", "pants", "jeans", "shorts", "scissors", "trousers", "binoculars", "goggles",
    "headphones", "tongs", "clothes", "tights", "leggings", "pajamas", "overalls", "pliers", "skis", "headquarters",
    "news", "series", "species", "media", "dice", "gas",
}  # fmt: skip


@cache
def singular(word: str) -> str:
    """Return the singular of a lower-case noun; any word that is not a plural, or has no singular, unchanged."""
    if word in _SINGULAR:
        return _SINGULAR[word]
    if word in NO_SINGULAR or len(word) < 3:
        return word
    from lemminflect import getAllLemmas, getLemma

    lemmas = getAllLemmas(word)
    if lemmas:
        return lemmas.get("NOUN", (word,))[0]
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return getLemma(word, "NOUN")[0]


@cache
def plurals(noun: str) -> frozenset[str]:
    """Return all plural forms of a lower-case noun: scarfs and scarves, buses and busses.

    A noun for which the dictionary has none gets an -s: broccolis.
    """
    from lemminflect import getInflection

    return frozenset(_PLURAL.get(noun) or {*getInflection(noun, "NNS")} - {noun} or {noun + "s"})


@cache
def plain_verb(word: str) -> str:
    """Return the plain form of a verb's -s form: `sits` -> `sit`; any other word unchanged."""
    from lemminflect import getLemma

    forms = getLemma(word, "VERB", lemmatize_oov=False) if word.endswith("s") and len(word) > 3 else ()
    return forms[0] if forms else word


@cache
def stem(word: str) -> str:
    """Return a key shared by singular and plural of a noun, and by a verb's regular forms. It need not be a word."""
    word = plain_verb(singular(word.removesuffix("'s")))
    for ending in ("ing", "ed"):
        rest = word.removesuffix(ending)
        if rest != word and len(rest) > 2 and re.search(r"[aeiouy]", rest):
            word = rest
    word = re.sub(r"([^\W\d_])\1$", r"\1", word)  # running -> runn -> run
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def with_article(name: str) -> str:
    """Return `a dog`, `an umbrella`; words without a singular stay alone: `scissors`."""
    if name.split()[-1:] and name.split()[-1] in NO_SINGULAR:
        return name
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"
