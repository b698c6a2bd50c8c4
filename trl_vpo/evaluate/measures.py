"""Named measures with confidence intervals, from numbers of each row. No model in here.

A function for each kind of evidence gives the rows of its measures; `estimate` turns rows into measures, `difference`
compares two models on the same rows. Rows are (N,) where the measure is their mean, or (N, 2), numerators and
denominators, where it is a ratio of sums.

| name | unit | what it is, and which way is better |
| --- | --- | --- |
| `preference/accuracy` | share of pairs | the chosen response has the higher summed log-prob; up |
| `preference/accuracy_average` | share of pairs | the same for log-probs per token, LeanPO's reward; up |
| `reward/accuracy` | share of pairs | the chosen response gained more log-prob over the base; up |
| `reward/margin` | nats | how much more it gained; TRL's rewards/margins without beta; up |
| `displacement/chosen` | nats | summed log-prob minus the base's; below 0 the chosen response got less likely |
| `displacement/rejected` | nats | the same for the rejected response |
| `displacement/both_fall` | share of pairs | both responses lost log-prob against the base; down |
| `kl/chosen` | nats per response | KL of the base and the model, summed over the response's tokens |
| `kl/chosen_per_token` | nats per token | all KL over all tokens |
| `sensitivity/<damage>` | nats per token | average log-prob lost when the media are damaged; up |
| `sensitivity/<damage>_share` | share of rows | the loss is above 0; up |
| `visibility/tau` | -1 to 1 | Kendall's tau-b of log-prob and visibility; 1: always falls as the object fades; up |
| `visibility/ordered` | share of lists | log-prob falls at every step of the list; up |
| `length/words`, `length/tokens` | per response | words between white space; tokens as given |
| `length/cut_off` | share of free answers | that the limit of new tokens cut off; down |
| `yes_no/basic`, `yes_no/hallucinated` | share of pairs | that question is answered rightly; up |
| `yes_no/overall` | share of pairs | both questions are, VideoHallucer's accuracy; up |
| `yes_no/yes_rate` | share of questions | answered yes; 0.5 is unbiased |
| `yes_no/pct_diff` | -0.5 to 0.5 | (answered yes - truly yes) / questions, the yes rate less 0.5; 0 is unbiased |
| `yes_no/fp_ratio` | share of wrong answers | that say yes; 0.5 is unbiased |
| `yes_no/unparsed` | share of questions | whose response says neither; down |
| `yes_no/cut_off` | share of questions | whose response the limit of new tokens cut off; down |
| `choice/letter` | share of rows | the letter read from the response is right; an unread one is wrong; up |
| `choice/unparsed` | share of rows | no letter could be read; down |
| `choice/cut_off` | share of rows | the limit of new tokens cut the response off; down |
| `choice/logp` | share of rows | the right option has the highest summed log-prob; up |
| `choice/logp_average` | share of rows | the same for log-probs per token; up |
| `chair/i` | share of mentions | hallucinated; down |
| `chair/s` | share of responses | with a hallucinated object: Rohrbach's CHAIRs, AMBER's Hal; down |
| `chair/s_mentioning` | share of responses with objects | the same, Object HalBench's CHAIRs; down |
| `chair/cover` | share of true objects | that are mentioned, AMBER's Cover; up |

Shares are from 0 to 1, log-probs natural logs. **Ties**: equal log-probs or gains of the two responses count half in
an accuracy (TRL's rewards/accuracies counts them as wrong, so an untrained model has 0 there and 0.5 here), options
that tie share the point, and no share "above 0" or of falls counts a tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_vpo.evaluate.intervals import clustered_bootstrap, paired_difference
from trl_vpo.text.chair import ResponseObjects

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """A figure with its confidence limits (nan where undefined) and n, the number of rows that it rests on."""

    value: float
    low: float
    high: float
    n: int


def estimate(rows: Mapping[str, Any], clusters: Sequence, **bootstrap: Any) -> dict[str, Measure]:
    """Return the measures of N rows.

    Args:
        rows: name -> (N,) or (N, 2), see above.
        clusters: (N,) what each row belongs to, such as its video.
        bootstrap: `level`, `resamples`, `seed` of `intervals.clustered_bootstrap`.

    Raises:
        ValueError: rows and clusters that do not fit, or a value that is not finite, with the measure's name.
    """
    measures = {}
    for name, values in rows.items():
        interval = _named(name, clustered_bootstrap, values, clusters, **bootstrap)
        measures[name] = Measure(*interval, n=int(_counts(values).sum()))
    return measures


def difference(
    first: Mapping[str, Any], second: Mapping[str, Any], clusters: Sequence, **bootstrap: Any
) -> dict[str, Measure]:
    """Return how much `second` exceeds `first` in every measure, both on the same N rows in the same order.

    n counts the rows that either rests on. Arguments and errors as in `estimate`; both must have the same names.
    """
    if first.keys() != second.keys():
        raise ValueError(f"only one side has {sorted(first.keys() ^ second.keys())}: compare the same measures.")
    measures = {}
    for name in first:
        interval = _named(name, paired_difference, first[name], second[name], clusters, **bootstrap)
        measures[name] = Measure(*interval, n=int((_counts(first[name]) | _counts(second[name])).sum()))
    return measures


@dataclass(frozen=True)
class PairScores:
    """N pairs under one model.

    Attributes:
        chosen, rejected: (N,) summed log-probs of the responses, nats.
        chosen_tokens, rejected_tokens: (N,) tokens summed over, at least 1.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray


def preference(scores: PairScores) -> Rows:
    """Preference for the chosen response; needs no base."""
    average = scores.chosen / scores.chosen_tokens - scores.rejected / scores.rejected_tokens
    return {
        "preference/accuracy": _wins(scores.chosen - scores.rejected),
        "preference/accuracy_average": _wins(average),
    }


def movement(scores: PairScores, base: PairScores) -> Rows:
    """Changes of the responses' log-probs from the base's: reward and likelihood displacement."""
    chosen, rejected = scores.chosen - base.chosen, scores.rejected - base.rejected  # (N,) log(model / base)
    return {
        "reward/accuracy": _wins(chosen - rejected),
        "reward/margin": chosen - rejected,
        "displacement/chosen": chosen,
        "displacement/rejected": rejected,
        "displacement/both_fall": (chosen < 0) & (rejected < 0),
    }


def divergence(kl: Any, tokens: Any) -> Rows:
    """KL along the chosen responses: kl (N,) summed over each response's tokens (N,)."""
    return {"kl/chosen": np.asarray(kl), "kl/chosen_per_token": _ratio(kl, tokens)}


def sensitivity(damage: str, clean: np.ndarray, damaged: np.ndarray, tokens: np.ndarray) -> Rows:
    """Dependence of a response's log-prob on its media.

    Args:
        damage: the kind of damage: "shuffled", "masked" or "blank".
        clean, damaged: (N,) summed log-prob of the response with its untouched and with its damaged media.
        tokens: (N,) tokens of the response.
    """
    lost = (clean - damaged) / tokens  # (N,)
    return {f"sensitivity/{damage}": lost, f"sensitivity/{damage}_share": lost > 0}


def visibility(logps: Sequence[Sequence[float]]) -> Rows:
    """Agreement of the chosen response's log-prob with the object's visibility, LPOI's ranking.

    Args:
        logps: for each row lp(chosen | x_1) .. lp(chosen | x_K), the image with the whole object first, the one with
            none of it last. K is at least 2 and may differ between rows.

    A list whose log-probs are all equal has no tau: it is left out of `visibility/tau` and counts as not ordered.
    """
    taus = np.array([kendall_tau(-np.arange(len(row)), row) for row in logps], dtype=np.float64)
    return {
        "visibility/tau": _ratio(np.nan_to_num(taus), ~np.isnan(taus)),
        "visibility/ordered": np.array([(np.diff(row) < 0).all() for row in logps], dtype=np.float64),
    }


def kendall_tau(first: Any, second: Any) -> float:
    """Return Kendall's tau-b of two rankings (K,), nan where all values of one side are equal.

    Concordant minus discordant pairs, over the geometric mean of the numbers of pairs that are not tied in either
    (Kendall, "The treatment of ties in ranking problems", Biometrika 1945).
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    upper = np.triu_indices(len(first), k=1)
    signs = [np.sign(values[:, None] - values[None, :])[upper] for values in (first, second)]  # (K * (K - 1) / 2,)
    untied = math.sqrt((signs[0] != 0).sum() * (signs[1] != 0).sum())
    return float((signs[0] * signs[1]).sum() / untied) if untied else math.nan


def lengths(responses: Sequence[str], tokens: Sequence[int]) -> Rows:
    """Lengths of N responses, empty ones too; tokens (N,) as counted."""
    words = [len(response.split()) for response in responses]
    return {"length/words": np.array(words), "length/tokens": np.array(tokens)}


def cut_off(name: str, ended: Any) -> Rows:
    """Answers that ran into the limit of new tokens: whether each did, (N,), or the share of a row's K, (N, K)."""
    cut = 1 - np.asarray(ended, dtype=np.float64)
    return {f"{name}/cut_off": cut if cut.ndim == 1 else cut.mean(axis=1)}


def yes_no(basic: Sequence[str | None], hallucinated: Sequence[str | None]) -> Rows:
    """VideoHallucer's measures; a row is a pair of questions.

    `basic` and `hallucinated` are what was answered to the two questions of each pair: "yes", "no" or neither. The
    first is right with yes, the second with no.

    Its total is the plain mean over its five kinds of hallucination, which are of equal size: the same as over all
    pairs. The bias figures follow their definitions (HallusionBench, arXiv 2310.14566, Eq. 6 and 7). VideoHallucer's
    `evaluation_bias.py` takes the basic response for the hallucinated question's where that one is wrong, so figures
    published with it can differ.
    """
    basic_yes, basic_no, false_yes, false_no = (
        np.array([answer == word for answer in side]) for side in (basic, hallucinated) for word in ("yes", "no")
    )
    yes, right = basic_yes.astype(int) + false_yes, basic_yes.astype(int) + false_no  # of two answers
    return {
        "yes_no/basic": basic_yes,
        "yes_no/hallucinated": false_no,
        "yes_no/overall": basic_yes & false_no,
        "yes_no/yes_rate": yes / 2,
        "yes_no/pct_diff": (yes - 1) / 2,
        "yes_no/fp_ratio": _ratio(false_yes, 2 - right),
        "yes_no/unparsed": (2 - yes - basic_no - false_no) / 2,
    }


def choice_letters(right: Sequence[bool | None]) -> Rows:
    """Multiple choice from free text: whether each row's letter is right, None where none could be read."""
    letters, unparsed = [bool(row) for row in right], [row is None for row in right]
    return {"choice/letter": np.array(letters), "choice/unparsed": np.array(unparsed)}


def choice_logps(credits: Sequence[float], average: Sequence[float]) -> Rows:
    """Multiple choice by log-prob: `choices.by_logprob` of each row, of summed log-probs and of those per token."""
    return {"choice/logp": np.array(credits), "choice/logp_average": np.array(average)}


def chair(responses: Sequence[ResponseObjects]) -> Rows:
    """CHAIR and Cover. Responses that mention nothing, empty ones too, count in `chair/s` and `chair/cover` alone."""
    mentioned, hallucinated, covered, truth = (
        np.array([len(getattr(response, name)) for response in responses])
        for name in ("mentioned", "hallucinated", "covered", "truth")
    )
    return {
        "chair/i": _ratio(hallucinated, mentioned),
        "chair/s": hallucinated > 0,
        "chair/s_mentioning": _ratio(hallucinated > 0, mentioned > 0),
        "chair/cover": _ratio(covered, truth),
    }


def _named(name: str, function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _counts(values: Any) -> np.ndarray:
    """(N,) bool: the rows that a measure rests on."""
    values = np.asarray(values)
    return np.ones(len(values), dtype=bool) if values.ndim == 1 else values[:, 1] > 0


def _ratio(numerators: Any, denominators: Any) -> np.ndarray:
    return np.stack([numerators, denominators], axis=1).astype(np.float64)  # (N, 2)


def _wins(difference: np.ndarray) -> np.ndarray:
    """1 above 0, 0 below, half for a tie."""
    return (np.sign(difference) + 1) / 2
