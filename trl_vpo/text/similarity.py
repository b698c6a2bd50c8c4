"""Trustworthiness in LeanPO's sense (arXiv 2506.05260): how far a response agrees with the ground truth, and how its
reward correlates with that.

The similarity that the paper used is not published. Here it is ROUGE-L's F1 (Lin 2004) over words: of two texts with m
and n words whose longest common subsequence has l words, 2 l / (m + n). Words are those of `trl_vpo.text.phrases`,
after NFKC and case folding, without punctuation and symbols. If neither text has a word (an emoji, say), the texts
themselves are compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from trl_vpo.text.phrases import split_words


def words(text: str) -> list[str]:
    """Return the words that are compared."""
    text = _folded(text)
    parts = [text[start:end] for start, end in split_words(text)]
    return [part for part in parts if any(unicodedata.category(character)[0] in "LN" for character in part)]


def right(answer: str, truth: str) -> bool:
    """Return whether an answer has the words of the ground truth, all of them, in order, and no other.

    Strict on purpose: of a longer answer that holds the truth, no rule can tell whether it also says the contrary.
    """
    pair = words(answer), words(truth)
    return pair[0] == pair[1] if any(pair) else _folded(answer) == _folded(truth)


def similarity(answer: str, truth: str) -> float:
    """Return ROUGE-L F1 of two texts, 0 (no word in common) to 1 (the same words in the same order); symmetric."""
    a, b = words(answer), words(truth)
    if not a and not b:
        return float(right(answer, truth))
    return 2 * common_subsequence(a, b) / (len(a) + len(b))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004): bit i of `row` is 0 where the usual table's row grows from column i to i + 1, and one
    addition works out the next row.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        grows = row & places.get(word, 0)
        row = (row + grows | row - grows) & full
    return len(a) - row.bit_count()


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation of N pairs; None for fewer than 3, or if one side does not vary."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)  # (N,)
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, equal values sharing their average rank; None as in `pearson`."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])  # (N,) from 1
    return pearson(*ranks)


def trust_margin(pair: dict[str, Any]) -> float:
    """Return how much better a row's winning response agrees with the ground truth than the losing one, -1 to 1."""
    return pair["chosen_trust"] - pair["rejected_trust"]


def pair_figures(pairs: Sequence[dict[str, Any]], *, plain: bool, rewards: bool) -> dict[str, Any]:
    """Return the figures of a set of pairs; None for one that has too few of them.

    `..._right`: share of responses that are `right`; with `plain` of the plain answers too, so that the hint's benefit
    shows. One that failed counts as not right, and in `plain_failures`. With `rewards`, of the pairs that were scored:
    `reward_accuracy`, the share whose winning response has the higher reward, and `reward_trust_pearson` and
    `reward_trust_spearman` over the winning and the losing responses together.
    """
    sides = ("chosen", "rejected")
    shares = [f"{answer}_right" for answer in (*sides, *(["plain"] if plain else []))]
    figures: dict[str, Any] = {"pairs": len(pairs)}
    figures |= {name: mean(pair[name] for pair in pairs) for name in (*shares, "chosen_trust", "rejected_trust")}
    if plain:
        figures["plain_failures"] = sum("plain_failure" in pair for pair in pairs)
    if not rewards:
        return figures
    scored = [pair for pair in pairs if "chosen_reward" in pair]
    figures |= {f"{text}_reward": mean(pair[f"{text}_reward"] for pair in scored) for text in (*sides, "answer")}
    figures["reward_accuracy"] = mean(pair["chosen_reward"] > pair["rejected_reward"] for pair in scored)
    points = [[pair[f"{side}_{axis}"] for pair in scored for side in sides] for axis in ("reward", "trust")]
    return figures | {"reward_trust_pearson": pearson(*points), "reward_trust_spearman": spearman(*points)}


def _folded(text: str) -> str:
    """Apply NFKC and case folding; the typographic apostrophe is written plainly."""
    return unicodedata.normalize("NFKC", text).casefold().replace("’", "'").strip()


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None without values."""
    values = list(values)
    return fmean(values) if values else None
