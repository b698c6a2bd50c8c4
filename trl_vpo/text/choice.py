"""Multiple-choice questions, scored by what the response says and by the options' log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from trl_vpo.text.choices import read_choice


def by_letter(response: str, options: Sequence[str], answer_index: int) -> bool | None:
    """Whether a response names the right option; None where it names none, several, or hedges.

    Letters and options' texts are read by the rules of `trl_vpo.text.choices.read_choice`.

    Args:
        options: (K,) the options' texts, which the question called A, B, C, ... in this order; at most 26.
        answer_index: which one is right, from 0.

    Raises:
        ValueError: an index outside of the options, or more options than letters.
    """
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options: there are letters for {len(ascii_uppercase)}.")
    _check_index(answer_index, len(options))
    named = read_choice(response, dict(zip(ascii_uppercase, options))).value
    return None if named is None else named == ascii_uppercase[answer_index]


def by_logprob(option_logps: Sequence[float], answer_index: int, lengths: Sequence[int] | None = None) -> float:
    """Whether the right option is the likeliest: 1 or 0; a tie at the top shares the point (1/3 of three).

    Args:
        option_logps: (K,) summed log-prob of each option as the response, nats. -inf is an impossible option.
        answer_index: which one is right, from 0.
        lengths: (K,) tokens of each option: compare the log-probs per token, so that short options have no head start.

    Raises:
        ValueError: no options, nan, an index outside of them, or lengths that do not fit.
    """
    scores = np.asarray(option_logps, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any() or np.isneginf(scores).all():
        raise ValueError(f"option log-probs {scores.tolist()}: give one number for each option.")
    _check_index(answer_index, len(scores))
    if lengths is not None:
        tokens = np.asarray(lengths)
        if tokens.shape != scores.shape or (tokens < 1).any():
            raise ValueError(f"lengths {tokens.tolist()} for {len(scores)} options: give each one's tokens.")
        scores = scores / tokens
    best = scores == scores.max()
    return float(best[answer_index] / best.sum())


def _check_index(answer_index: int, count: int) -> None:
    if not 0 <= answer_index < count:
        raise ValueError(f"answer_index {answer_index} is not one of the {count} options, which count from 0.")
