"""Named measures with confidence intervals, from numbers of each row. No model in here.

`evidence` gives the rows of all measures from records, the lines of `rows.jsonl`; `estimate` turns rows into measures,
`difference` compares two models on the same rows. Rows are (N,) where the measure is their mean, or (N, 2), numerators
and denominators, where it is a ratio of sums.

docs/metrics.md says what each measure is. **Ties**: equal log-probs or gains of the two responses count half in an
accuracy, options that tie share the point, and no share "above 0" or of falls counts a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_vpo.data.numbers import both_fall
from trl_vpo.evaluate import questions
from trl_vpo.evaluate.intervals import Interval, clustered_bootstrap, paired_difference
from trl_vpo.evaluate.questions import Evidence, Records, Rows, of_task, ratio, row_clusters


def estimate(rows: Mapping[str, Any], clusters: Sequence, **bootstrap: Any) -> dict[str, Interval]:
    """Return the measures of N rows, given as name -> (N,) or (N, 2); for the rest see `clustered_bootstrap`."""
    return {name: _interval(name, clustered_bootstrap, values, clusters, **bootstrap) for name, values in rows.items()}


def difference(
    first: Mapping[str, Any], second: Mapping[str, Any], clusters: Sequence, **bootstrap: Any
) -> dict[str, Interval]:
    """Return how much `second` exceeds `first` in every measure; both are of the same N rows in the same order."""
    if first.keys() != second.keys():
        raise ValueError(f"only one side has {sorted(first.keys() ^ second.keys())}: compare the same measures.")
    return {
        name: _interval(name, paired_difference, first[name], second[name], clusters, **bootstrap) for name in first
    }


def _interval(name: str, function: Callable[..., Interval], *values: Any, **bootstrap: Any) -> Interval:
    """Call a bootstrap; its errors name the measure."""
    try:
        return function(*values, **bootstrap)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# --- evidence -----------------------------------------------------------------------------------------------------


def evidence(records: Records, base: Records) -> Evidence:
    """Return the rows of all measures that a candidate's records give, as `questions.read` leaves them.

    `base` has the records of the same rows in the same order. A kind without rows is left out.
    """
    preferences, captions = (of_task(records, task) for task in ("preference", "chair"))
    kinds = preference_evidence(preferences, of_task(base, "preference"))
    if lists := [r for r in preferences if r.get("image_logps")]:
        kinds["visibility"] = visibility([r["image_logps"] for r in lists]), row_clusters(lists)
    if pairs := [(pair["yes"], pair["no"]) for pair in questions.question_pairs(records).values() if len(pair) == 2]:
        kinds["yes_no"] = questions.yes_no(pairs), questions.join_clusters(map(row_clusters, pairs))
    asked = of_task(records, "yes_no")
    kinds |= _by_group("binary", [r for r in asked if "pair" not in r], questions.binary)
    kinds |= questions.question_sets(asked)
    for kind, rows_of in (("choice", questions.choice), ("letters", questions.letters), ("rated", questions.rated)):
        kinds |= _by_group(kind, of_task(records, kind), rows_of)
    if captions:
        kinds["chair"] = questions.chair(captions), row_clusters(captions)
    if answers := [r for r in records if r["task"] in ("chair", "preference") and "response" in r]:
        rows = {
            "length/words": np.array([len(r["response"].split()) for r in answers]),
            "length/tokens": np.array([r["response_tokens"] for r in answers]),
            "length/cut_off": questions.were_cut_off(answers),
        }
        kinds["answers"] = rows, row_clusters(answers)
    return kinds


def preference_evidence(records: Records, base: Records | None) -> Evidence:
    """Return the evidence of preference rows: log-probs, sensitivity; with a base also movement and KL."""
    if not records:
        return {}
    chosen, rejected, tokens, rejected_tokens = _pair_scores(records)
    average, rejected_average = chosen / tokens, rejected / rejected_tokens
    rows = {
        "preference/accuracy": _wins(chosen - rejected),
        "preference/accuracy_average": _wins(average - rejected_average),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/chosen_average": average,
        "logps/rejected_average": rejected_average,
    }
    if base is not None:
        base_chosen, base_rejected, *_ = _pair_scores(base)
        gain, rejected_gain = chosen - base_chosen, rejected - base_rejected  # (N,) log(model / base)
        kl = np.array([r["chosen_kl"] for r in records])
        rows |= {
            "reward/accuracy": _wins(gain - rejected_gain),
            "reward/margin": gain - rejected_gain,
            "displacement/chosen": gain,
            "displacement/rejected": rejected_gain,
            "displacement/both_fall": both_fall(gain, rejected_gain),
            "kl/chosen": kl,
            "kl/chosen_per_token": ratio(kl, tokens),
        }
    kinds = {"preference": (rows, row_clusters(records))}
    for damage in dict.fromkeys(damage for record in records for damage in record.get("damaged_logps") or ()):
        own = [record for record in records if damage in (record.get("damaged_logps") or ())]
        clean, _, tokens, _ = _pair_scores(own)
        lost = (clean - [record["damaged_logps"][damage] for record in own]) / tokens  # (N,)
        kinds[damage] = {f"sensitivity/{damage}": lost, f"sensitivity/{damage}_share": lost > 0}, row_clusters(own)
    return kinds


def visibility(logps: Sequence[Sequence[float]]) -> Rows:
    """Agreement of the chosen response's log-prob with the object's visibility, LPOI's ranking.

    A row is lp(chosen | x_1) .. lp(chosen | x_K), the image with the whole object first. tau is Kendall's tau-b: pairs
    of images in order minus those in reverse, over the geometric mean of all pairs and of those that do not tie
    (Kendall, "The treatment of ties in ranking problems", Biometrika 1945). A list whose log-probs are all equal has
    no tau: it is left out of `visibility/tau` and counts as not ordered.
    """
    taus = []
    for row in logps:
        falls = np.sign(np.subtract.outer(row, row))[np.triu_indices(len(row), k=1)]  # (K * (K - 1) / 2,)
        untied = (falls != 0).sum()
        taus.append(falls.sum() / math.sqrt(len(falls) * untied) if untied else math.nan)
    return {
        "visibility/tau": ratio(np.nan_to_num(taus), ~np.isnan(taus)),
        "visibility/ordered": np.array([(np.diff(row) < 0).all() for row in logps], dtype=np.float64),
    }


def _by_group(kind: str, records: Records, rows_of: Callable[[Records], Rows]) -> Evidence:
    """The measures of all records under their kind, and of each group under a name such as `choice[counting]`."""
    groups: dict[str, list[Mapping]] = {kind: list(records)} if records else {}
    for record in records:
        if "group" in record:
            groups.setdefault(f"{kind}[{record['group']}]", []).append(record)
    kinds: Evidence = {}
    for name, group in groups.items():
        rows = {measure.replace(kind, name, 1): values for measure, values in rows_of(group).items()}
        kinds[name] = rows, row_clusters(group)
    return kinds


def _pair_scores(records: Records) -> list[np.ndarray]:
    """(N,) each: summed log-probs of the chosen and the rejected responses, and their tokens."""
    names = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
    return [np.array([record[name] for record in records], dtype=float) for name in names]


def _wins(difference: np.ndarray) -> np.ndarray:
    """1 above 0, 0 below, half for a tie."""
    return (np.sign(difference) + 1) / 2
