"""Is a caption of the world true? Checked against the facts, sentence by sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from studies.testbed.grammar import next_sentences, sentence
from trl_vpo.testbed.language import true_sentences
from trl_vpo.testbed.world import Things


@dataclass(frozen=True)
class CaptionCheck:
    """A caption against the facts.

    Attributes:
        parsed: it is a caption of the world's grammar.
        false: sentences of the grammar that nothing supports.
    """

    parsed: bool
    false: tuple[str, ...]

    @property
    def hallucinated(self) -> bool:
        return bool(self.false)

    @property
    def true(self) -> bool:
        return self.parsed and not self.false


def captions(things: Things) -> list[str]:
    """Return all true captions."""
    return [" ".join(chosen) for chosen in product(*true_sentences(things))]


def check_caption(text: str, things: Things) -> CaptionCheck:
    """Check a caption sentence by sentence, up to the first that the grammar does not have."""
    said, false = [], []
    for part in re.findall(r"[^.]+\.?", " ".join(text.split())):
        words = tuple(re.findall(r"\w+|[^\w\s]", part))
        options = next_sentences(things, said)
        fits = [o for o in options if len(o.words) == len(words) and all(w in c for w, c in zip(words, o.words))]
        if not fits or sentence(words) != part.strip():
            return CaptionCheck(False, tuple(false))
        if words not in [option.truth for option in fits]:
            false.append(sentence(words))
        said.append(fits[0].tag)
    over = "stop" in said or ("order" in said and ("still" in said or len(said) == 3))
    return CaptionCheck(over, tuple(false))
