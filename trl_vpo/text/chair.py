"""CHAIR: the objects that a response mentions, and those of them that are not in the picture.

Rohrbach et al. 2018, "Object Hallucination in Image Captioning" (arXiv 1809.02156). The counts follow the
published code (github.com/LisaAnne/Hallucination, utils/chair.py):

- **Every mention counts**: "a dog and another dog" are two mentions. AMBER (arXiv 2311.07397;
  github.com/junyangwang0410/AMBER, inference.py) does the same.
- CHAIRi = hallucinated mentions / all mentions, summed over the responses before dividing.
- CHAIRs = responses with a hallucinated object / all responses (Rohrbach et al.; AMBER calls it Hal). Object HalBench
  (RLHF-V, arXiv 2312.00849) divides by the responses that mention any object, `CHAIRs_refine` in its code.
- Cover (AMBER) = distinct objects of the truth that are mentioned / objects of the truth, summed before dividing as in
  AMBER's code; the same as the object recall of Object HalBench.

Not implemented: AMBER's Cog, which needs a list of tempting objects for every image, its matching by word vectors, and
the objects that Object HalBench lets GPT extract and counts once per response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trl_vpo.errors import UserError
from trl_vpo.text.inflection import plurals

# Hard-coded in the published codes for COCO: "baby" and "passenger" name persons, but not in "baby bird".
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
READS_AS: dict[str, str | None] = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "seat of the toilet": "toilet",
    "home plate": None,
    "train track": None,
}

# A word may hold apostrophes and hyphens; any other mark ends a phrase, as in "It is hot. Dogs sleep."
_TOKEN = re.compile(r"[^\W_]+(?:[-'’‐‑][^\W_]+)*|[^\w\s]|_")
_POSSESSIVE = re.compile(r"['’]s$")
_HYPHEN = re.compile("[-‐‑]")


@dataclass(frozen=True)
class Mention:
    """An object in a response: the words as the table has them, and the object's name."""

    words: str
    object: str


class ObjectTable:
    """A table of objects and the words for them.

    Longer phrases win over shorter ones ("hot dog" is not a dog), from left to right, within one sentence part. A word
    with a hyphen is one word: "hot-dog" is a hot dog, "man-made" is not a man.

    Args:
        synonyms: the object's name, itself a word for it -> further words or phrases in the singular; plurals are made
            by rule. UserError for an empty word, or one that is given to two objects.
        reads_as: phrases that mean something else than their words: the word to read instead, which counts if it is
            in the table, or None for no object. The table's own phrases keep their meaning.
    """

    def __init__(self, synonyms: Mapping[str, Iterable[str]], reads_as: Mapping[str, str | None] = READS_AS):
        self._names: dict[tuple[str, ...], Mention | None] = {}
        for name, words in synonyms.items():
            for word in (name, *words):
                key = _key(word.split())
                if not key:
                    raise UserError(f"object {name!r} has an empty word {word!r} in the table. Remove it.")
                mention = self._names.setdefault(key, Mention(" ".join(key), name))
                if mention.object != name:
                    raise UserError(
                        f"{word!r} is listed for both {mention.object!r} and {name!r}. Keep it with one of them."
                    )
        listed = dict(self._names)
        for phrase, word in reads_as.items():
            self._names.setdefault(_key(phrase.split()), listed.get(_key((word or "").split())))
        for key, mention in list(self._names.items()):
            for plural in plurals(key[-1]):
                self._names.setdefault((*key[:-1], plural), mention)
        self._longest = max(map(len, self._names), default=0)

    def name(self, word: str) -> str:
        """Return the name of the object that a word or phrase means; raise UserError if the table does not know it."""
        mention = self._names.get(_key(word.split()))
        if mention is None:
            text = f"object {word!r} is not in the table of synonyms. Add a line of its names by commas, or drop it."
            raise UserError(text)
        return mention.object

    def mentions(self, response: str) -> list[Mention]:
        """Return every mention of an object, in order, with repetitions."""
        tokens = _key(_TOKEN.findall(response))
        mentions, start = [], 0
        while start < len(tokens):
            ends = range(min(start + self._longest, len(tokens)), start, -1)
            end = next((end for end in ends if tokens[start:end] in self._names), start + 1)
            key = tokens[start:end]
            mentions.append(self._names.get(key if key in self._names else tuple(_HYPHEN.split(key[0]))))
            start = end
        return [mention for mention in mentions if mention is not None]


def _key(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(_POSSESSIVE.sub("", word.lower()) for word in words)


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Read a file like the published `synonyms.txt`: each line has an object's name, then its synonyms, by commas.

    Raises UserError for a file that cannot be read, two lines that begin with the same name, or no object.
    """
    table: dict[str, list[str]] = {}
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"synonyms: {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"synonyms: {path}, line {line}: {error.reason}. Save the file as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        words = [word.strip() for word in line.split(",") if word.strip()]
        if not words:
            continue
        if words[0] in table:
            raise UserError(f"{path}, line {number}: {words[0]!r} begins a second line. Join the two lines.")
        table[words[0]] = words[1:]
    if not table:
        raise UserError(f"{path} lists no object: give one object per line, as in `dog, puppy, hound`.")
    return table


@dataclass(frozen=True)
class ResponseObjects:
    """The objects of one response; `trl_vpo.evaluate.questions.chair` counts them."""

    mentioned: list[Mention]
    hallucinated: list[Mention]  # the mentions that are not in the truth
    truth: set[str]  # names of the objects that are there
    covered: set[str]  # those of them that are mentioned


def read_response(response: str, truth: Iterable[str], table: ObjectTable) -> ResponseObjects:
    """Compare the objects that a response mentions with those that are there, named by their names or synonyms."""
    present = {table.name(word) for word in truth}
    mentioned = table.mentions(response)
    hallucinated = [mention for mention in mentioned if mention.object not in present]
    return ResponseObjects(mentioned, hallucinated, present, present & {mention.object for mention in mentioned})
