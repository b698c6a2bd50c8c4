"""Yes/no questions: what a response says, and pairs of questions scored as VideoHallucer does.

Two rules read a response:

- "videohallucer": the expected answer stands anywhere in the response as a word, in any case. It is the rule of
  VideoHallucer (Wang et al. 2024, arXiv 2406.16338; github.com/patrick-tssn/VideoHallucer, evaluations/) and of RRPO's
  evaluation on it (github.com/pritamqu/RRPO, eval/videohallucer/evaluation_utils.py). "Yes, there is no dog" is right
  whichever answer is expected.
- "strict": the response holds exactly one of the two words, in whatever place, case and punctuation. With both of them
  it says nothing: "Yes and no", "Yes, there is no dog".

Under both, "no" inside of "snowboard" or "know" is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Answer = Literal["yes", "no"]
Rule = Literal["videohallucer", "strict"]

_BENCHMARK_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
# Unlike \b: `no-one` is one word, and Markdown's `_` is not part of a word.
_WORD = re.compile(r"[^\W_]+(?:[-'’‐‑][^\W_]+)*")


def parse(response: str, rule: Rule = "videohallucer", expected: Answer | None = None) -> Answer | None:
    """What a response says: "yes", "no", or None where the rule cannot tell.

    Args:
        expected: the right answer. The rule "videohallucer" needs it to read a response with both words, which
            counts as right either way; without it such a response gives None. "strict" does not look at it.

    Raises:
        TypeError: the response is no string.
        ValueError: an unknown rule.
    """
    if not isinstance(response, str):
        raise TypeError(f"the response {response!r} is no text. A missing response is an empty string.")
    if rule not in ("videohallucer", "strict"):
        raise ValueError(f'rule is {rule!r}: give "videohallucer" or "strict".')
    words = (_BENCHMARK_WORD if rule == "videohallucer" else _WORD).findall(response)
    said = {word.lower() for word in words} & {"yes", "no"}
    if rule == "videohallucer" and expected in said:
        return expected
    return said.pop() if len(said) == 1 else None


@dataclass(frozen=True)
class PairedAnswers:
    """N pairs of a basic question (the answer is yes) and a hallucinated one (the answer is no).

    Attributes:
        basic_yes, basic_no: (N,) bool, what was answered to the basic question; neither: unparsed.
        hallucinated_yes, hallucinated_no: (N,) the same for the hallucinated question.
    """

    basic_yes: np.ndarray
    basic_no: np.ndarray
    hallucinated_yes: np.ndarray
    hallucinated_no: np.ndarray

    @property
    def both_right(self) -> np.ndarray:
        """(N,) bool: the pair counts, as both of its questions are answered rightly."""
        return self.basic_yes & self.hallucinated_no

    @property
    def yes(self) -> np.ndarray:
        """(N,) how many of a pair's two answers are yes; one is right."""
        return self.basic_yes.astype(int) + self.hallucinated_yes

    @property
    def unparsed(self) -> np.ndarray:
        """(N,) how many of a pair's two responses say neither; they count as wrong."""
        return 2 - self.yes - self.basic_no - self.hallucinated_no

    @property
    def wrong(self) -> np.ndarray:
        """(N,) how many of a pair's two answers are wrong, the unparsed ones among them."""
        return 2 - self.basic_yes.astype(int) - self.hallucinated_no


def score_pairs(basic: Sequence[str], hallucinated: Sequence[str], rule: Rule = "videohallucer") -> PairedAnswers:
    """Reads the responses to N basic and N hallucinated questions, in the same order.

    Raises:
        ValueError: unequal numbers of responses, or an unknown rule.
        TypeError: a response that is no string.
    """
    if len(basic) != len(hallucinated):
        raise ValueError(f"{len(basic)} basic responses but {len(hallucinated)} hallucinated ones: give pairs.")
    first = [parse(response, rule, "yes") for response in basic]
    second = [parse(response, rule, "no") for response in hallucinated]
    return PairedAnswers(
        *(np.array([said == word for said in side], dtype=bool) for side in (first, second) for word in ("yes", "no"))
    )
