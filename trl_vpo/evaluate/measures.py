"""From per-row numbers to named measures with confidence intervals. No model in here.

A function for each kind of evidence gives the rows of its measures; `estimate` turns rows into measures, `difference`
compares two models on the same rows. Rows are (N,) where the measure is their mean, or (N, 2), numerators and
denominators, where it is a ratio of sums. Rows are all that must be kept to compare two runs later.

| name | unit | what it is, and which way is better |
| --- | --- | --- |
| `preference/accuracy` | share of pairs | the chosen response has the higher summed log-prob; up |
| `preference/accuracy_average` | share of pairs | the same for log-probs per token, LeanPO's reward; up |
| `reward/accuracy` | share of pairs | the chosen response gained more log-prob over the base; up |
| `reward/margin` | nats | how much more it gained; TRL's rewards/margins without beta; up |
| `displacement/chosen` | nats | summed log-prob minus the base's; below 0 the chosen response got less likely |
| `displacement/rejected` | nats | the same for the rejected response |
| `displacement/both_fall` | share of pairs | both responses lost log-prob against the base; down |
| `kl/chosen` | nats per response | KL summed over the response's tokens; `kl/<side>` for any side |
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
from trl_vpo.text.chair import ChairCounts
from trl_vpo.text.yes_no import PairedAnswers

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """A figure with its confidence limits (nan where undefined) and n, the number of rows that it rests on."""

    value: float
    low: float
    high: float
    n: int


def estimate(rows: Mapping[str, Any], clusters: Sequence, **bootstrap: Any) -> dict[str, Measure]:
    """The measures of N rows.

    Args:
        rows: name -> (N,) or (N, 2), see above.
        clusters: (N,) what each row belongs to, such as its video.
        bootstrap: `level`, `resamples`, `seed` of `intervals.clustered_bootstrap`.

    Raises:
        ValueError: rows and clusters that do not fit, or a value that is not finite, with the measure's name.
    """
    measures = {}
    for name, values in rows.items():
        values = np.asarray(values, dtype=np.float64)
        interval = _named(name, clustered_bootstrap, values, clusters, _statistic(values), **bootstrap)
        measures[name] = Measure(*interval, n=int(_counts(values).sum()))
    return measures


def difference(
    first: Mapping[str, Any], second: Mapping[str, Any], clusters: Sequence, **bootstrap: Any
) -> dict[str, Measure]:
    """How `second` differs from `first` in every measure, both on the same N rows in the same order.

    n counts the rows that either rests on. Arguments and errors as in `estimate`; both must have the same names.
    """
    if first.keys() != second.keys():
        raise ValueError(f"only one side has {sorted(first.keys() ^ second.keys())}: compare the same measures.")
    measures = {}
    for name in first:
        pair = [np.asarray(side[name], dtype=np.float64) for side in (first, second)]
        interval = _named(name, paired_difference, *pair, clusters, _statistic(pair[0]), **bootstrap)
        measures[name] = Measure(*interval, n=int((_counts(pair[0]) | _counts(pair[1])).sum()))
    return measures


@dataclass(frozen=True)
class PairScores:
    """N pairs under one model.

    Attributes:
        chosen, rejected: (N,) summed log-probs of the responses, nats.
        chosen_tokens, rejected_tokens: (N,) tokens summed over, at least 1.

    Raises:
        ValueError: unequal lengths, a log-prob that is not finite, a response without tokens.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    def __post_init__(self) -> None:
        for name, values in _columns(**vars(self)).items():
            object.__setattr__(self, name, values)


def preference(scores: PairScores) -> Rows:
    """How often the model prefers the chosen response; needs no base."""
    average = scores.chosen / scores.chosen_tokens - scores.rejected / scores.rejected_tokens
    return {
        "preference/accuracy": _wins(scores.chosen - scores.rejected),
        "preference/accuracy_average": _wins(average),
    }


def movement(scores: PairScores, base: PairScores) -> Rows:
    """Where the likelihoods of the responses went from the base's: reward and likelihood displacement."""
    _same_length(model=scores.chosen, base=base.chosen)
    chosen, rejected = scores.chosen - base.chosen, scores.rejected - base.rejected  # (N,) log(model / base)
    return {
        "reward/accuracy": _wins(chosen - rejected),
        "reward/margin": chosen - rejected,
        "displacement/chosen": chosen,
        "displacement/rejected": rejected,
        "displacement/both_fall": (chosen < 0) & (rejected < 0),
    }


def divergence(kl: Any, tokens: Any, side: str = "chosen") -> Rows:
    """KL along responses: kl (N,) summed over each response's tokens (N,); `side` names whose responses."""
    columns = _columns(kl=kl, tokens=tokens)
    return {f"kl/{side}": columns["kl"], f"kl/{side}_per_token": _ratio(columns["kl"], columns["tokens"])}


def sensitivity(clean: Any, damaged: Mapping[str, Any], tokens: Any) -> Rows:
    """How much of a response's log-prob hangs on its media.

    Args:
        clean: (N,) summed log-prob of the response with its untouched media.
        damaged: how the media were damaged ("shuffled", "masked", "blank") -> (N,) the same response's log-prob.
        tokens: (N,) tokens of the response.
    """
    rows = {}
    for name, values in damaged.items():
        columns = _columns(clean=clean, damaged=values, tokens=tokens)
        lost = (columns["clean"] - columns["damaged"]) / columns["tokens"]  # (N,)
        rows |= {f"sensitivity/{name}": lost, f"sensitivity/{name}_share": lost > 0}
    return rows


def visibility(logps: Sequence[Sequence[float]]) -> Rows:
    """Whether the chosen response's log-prob follows the object's visibility, LPOI's ranking.

    Args:
        logps: for each row lp(chosen | x_1) .. lp(chosen | x_K), the image with the whole object first, the one with
            none of it last. K is at least 2 and may differ between rows.

    A list whose log-probs are all equal has no tau: it is left out of `visibility/tau` and counts as not ordered.
    """
    lists = [np.asarray(row, dtype=np.float64) for row in logps]
    for number, row in enumerate(lists):
        if row.ndim != 1 or len(row) < 2 or not np.isfinite(row).all():
            raise ValueError(f"list {number} is {row.tolist()}: give at least two finite log-probs.")
    taus = np.array([kendall_tau(-np.arange(len(row)), row) for row in lists], dtype=np.float64)
    return {
        "visibility/tau": _ratio(np.nan_to_num(taus), ~np.isnan(taus)),
        "visibility/ordered": np.array([(np.diff(row) < 0).all() for row in lists], dtype=np.float64),
    }


def kendall_tau(first: Any, second: Any) -> float:
    """Kendall's tau-b of two rankings (K,): concordant minus discordant pairs, over the geometric mean of the numbers
    of pairs that are not tied in either (Kendall, "The treatment of ties in ranking problems", Biometrika 1945).

    Returns nan where all values of one side are equal.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    _same_length(first=first, second=second)
    upper = np.triu_indices(len(first), k=1)
    signs = [np.sign(values[:, None] - values[None, :])[upper] for values in (first, second)]  # (K * (K - 1) / 2,)
    untied = math.sqrt((signs[0] != 0).sum() * (signs[1] != 0).sum())
    return float((signs[0] * signs[1]).sum() / untied) if untied else math.nan


def lengths(responses: Sequence[str], tokens: Any = None) -> Rows:
    """How long N responses are, empty ones too; `tokens` (N,) where they were counted."""
    rows = {"length/words": np.array([len(response.split()) for response in responses], dtype=np.float64)}
    if tokens is not None:
        _same_length(responses=responses, tokens=tokens)
        rows["length/tokens"] = np.asarray(tokens, dtype=np.float64)
    return rows


def cut_off(name: str, ended: Any) -> Rows:
    """Whether answers ran into the limit of new tokens, (N,), or what share of K answers a row, (N, K)."""
    cut = 1 - np.asarray(ended, dtype=np.float64)
    return {f"{name}/cut_off": cut if cut.ndim == 1 else cut.mean(axis=1)}


def yes_no(answers: PairedAnswers) -> Rows:
    """VideoHallucer's measures; a row is a pair of questions.

    Its total is the plain mean over its five kinds of hallucination, which are of equal size: the same as over all
    pairs. The bias figures follow their definitions (HallusionBench, arXiv 2310.14566, Eq. 6 and 7). VideoHallucer's
    `evaluation_bias.py` takes the basic response for the hallucinated question's where that one is wrong, so figures
    published with it can differ.
    """
    return {
        "yes_no/basic": answers.basic_yes,
        "yes_no/hallucinated": answers.hallucinated_no,
        "yes_no/overall": answers.both_right,
        "yes_no/yes_rate": answers.yes / 2,
        "yes_no/pct_diff": (answers.yes - 1) / 2,
        "yes_no/fp_ratio": _ratio(answers.hallucinated_yes, answers.wrong),
        "yes_no/unparsed": answers.unparsed / 2,
    }


def choice_letters(right: Sequence[bool | None]) -> Rows:
    """Multiple choice from free text: whether each row's letter is right, None where none could be read."""
    return {
        "choice/letter": np.array([bool(row) for row in right], dtype=np.float64),
        "choice/unparsed": np.array([row is None for row in right], dtype=np.float64),
    }


def choice_logps(credits: Sequence[float], *, average: bool = False) -> Rows:
    """Multiple choice by log-prob: `choice.by_logprob` of each row, with lengths (`average`) or without."""
    return {"choice/logp_average" if average else "choice/logp": np.asarray(credits, dtype=np.float64)}


def chair(counts: ChairCounts) -> Rows:
    """CHAIR and Cover. Responses that mention nothing, empty ones too, count in `chair/s` and `chair/cover` alone."""
    false = counts.hallucinated > 0
    return {
        "chair/i": _ratio(counts.hallucinated, counts.mentioned),
        "chair/s": false,
        "chair/s_mentioning": _ratio(false, counts.mentioned > 0),
        "chair/cover": _ratio(counts.covered, counts.truth),
    }


def _named(name: str, function: Any, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _statistic(values: np.ndarray) -> str:
    return "mean" if values.ndim == 1 else "ratio"


def _counts(values: np.ndarray) -> np.ndarray:
    """(N,) bool: the rows that a measure rests on."""
    return np.ones(len(values), dtype=bool) if values.ndim == 1 else values[:, 1] > 0


def _ratio(numerators: Any, denominators: Any) -> np.ndarray:
    return np.stack([np.asarray(numerators), np.asarray(denominators)], axis=1).astype(np.float64)  # (N, 2)


def _wins(difference: np.ndarray) -> np.ndarray:
    """1 above 0, 0 below, half for a tie."""
    return (np.sign(difference) + 1) / 2


def _columns(**columns: Any) -> dict[str, np.ndarray]:
    """The columns as equally long float64 arrays, finite, those of tokens at least 1."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    _same_length(**arrays)
    for name, array in arrays.items():
        bad = np.flatnonzero(~np.isfinite(array) | (name.endswith("tokens") & (array < 1)))
        if len(bad):
            raise ValueError(f"row {bad[0]} has {name} {array[bad[0]]}: give finite numbers and at least one token.")
    return arrays


def _same_length(**arrays: Any) -> None:
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"rows do not fit together: {sizes}. Give the same rows in the same order.")
