"""Named measures with confidence intervals, from numbers of each row. No model in here.

`evidence` gives the rows of all measures from records, the lines of `rows.jsonl`; `estimate` turns rows into measures,
`difference` compares two models on the same rows. Rows are (N,) where the measure is their mean, or (N, 2), numerators
and denominators, where it is a ratio of sums.

docs/metrics.md says what each measure is. **Ties**: equal log-probs or gains of the two responses count half in an
accuracy, options that tie share the point, and no share "above 0" or of falls counts a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_vpo.evaluate.intervals import clustered_bootstrap, paired_difference
from trl_vpo.evaluate.rows import option_index
from trl_vpo.text.chair import ObjectTable, ResponseObjects, read_response
from trl_vpo.text.choices import by_letter, by_logprob
from trl_vpo.text.yes_no import read_yes_no

Records = Sequence[Mapping[str, Any]]
Rows = dict[str, np.ndarray]
Evidence = dict[str, tuple[Rows, list[str]]]  # kind -> rows of measures, and the cluster of each row


@dataclass(frozen=True)
class Measure:
    """A figure with its confidence limits (nan where undefined) and n, the number of rows that it rests on."""

    value: float
    low: float
    high: float
    n: int


def estimate(rows: Mapping[str, Any], clusters: Sequence, **bootstrap: Any) -> dict[str, Measure]:
    """Return the measures of N rows, given as name -> (N,) or (N, 2); for the rest see `clustered_bootstrap`."""
    return {name: _measure(name, clustered_bootstrap, [values], clusters, bootstrap) for name, values in rows.items()}


def difference(
    first: Mapping[str, Any], second: Mapping[str, Any], clusters: Sequence, **bootstrap: Any
) -> dict[str, Measure]:
    """Return how much `second` exceeds `first` in every measure; both are of the same N rows in the same order."""
    if first.keys() != second.keys():
        raise ValueError(f"only one side has {sorted(first.keys() ^ second.keys())}: compare the same measures.")
    sides = {name: [first[name], second[name]] for name in first}
    return {name: _measure(name, paired_difference, values, clusters, bootstrap) for name, values in sides.items()}


def _measure(name: str, function: Any, sides: list, clusters: Sequence, bootstrap: dict[str, Any]) -> Measure:
    """Return a figure that rests on the rows with a denominator in any of the sides."""
    try:
        interval = function(*sides, clusters, **bootstrap)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    arrays = [np.asarray(values) for values in sides]
    counted = [array[:, 1] > 0 if array.ndim == 2 else np.ones(len(array), bool) for array in arrays]
    return Measure(*interval, n=int(np.logical_or.reduce(counted).sum()))


# --- evidence -----------------------------------------------------------------------------------------------------


def evidence(
    records: Records, base: Records, rule: str = "videohallucer", table: ObjectTable | None = None
) -> Evidence:
    """Return the rows of all measures that a candidate's records give; a kind without rows is left out.

    `base` has the records of the same rows in the same order. `rule` is how a yes or a no is read.
    """
    preferences, choices, captions = (_of_task(records, task) for task in ("preference", "choice", "chair"))
    kinds = preference_evidence(preferences, _of_task(base, "preference"))
    if lists := [r for r in preferences if r.get("image_logps")]:
        kinds["visibility"] = visibility([r["image_logps"] for r in lists]), _clusters(lists)
    if pairs := [(pair["yes"], pair["no"]) for pair in question_pairs(records).values() if len(pair) == 2]:
        rows = yes_no(*zip(*([read_answer(record, rule) for record in pair] for pair in pairs)))
        cut_off = [1 - (yes["response_ended"] + no["response_ended"]) / 2 for yes, no in pairs]
        kinds["yes_no"] = rows | {"yes_no/cut_off": np.array(cut_off)}, _joined([_clusters(pair) for pair in pairs])
    single = [r for r in _of_task(records, "yes_no") if "pair" not in r]
    for name, group in _by_group("binary", single):
        kinds[name] = _named(name, binary(group, [read_answer(r, rule) for r in group])), _clusters(group)
    kinds |= question_sets(_of_task(records, "yes_no"), rule)
    for name, group in _by_group("choice", choices):
        kinds[name] = _named(name, choice(group)), _clusters(group)
    if captions:
        objects = [read_response(r["response"], r["objects"], table) for r in captions]
        kinds["chair"] = chair(objects), _clusters(captions)
    if answers := [r for r in records if r["task"] in ("chair", "preference") and "response" in r]:
        rows = {
            "length/words": np.array([len(r["response"].split()) for r in answers]),
            "length/tokens": np.array([r["response_tokens"] for r in answers]),
            "length/cut_off": _cut_off(answers),
        }
        kinds["answers"] = rows, _clusters(answers)
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
            "displacement/both_fall": (gain < 0) & (rejected_gain < 0),
            "kl/chosen": kl,
            "kl/chosen_per_token": _ratio(kl, tokens),
        }
    kinds = {"preference": (rows, _clusters(records))}
    for damage in dict.fromkeys(damage for record in records for damage in record.get("damaged_logps") or ()):
        own = [record for record in records if damage in (record.get("damaged_logps") or ())]
        clean, _, tokens, _ = _pair_scores(own)
        lost = (clean - [record["damaged_logps"][damage] for record in own]) / tokens  # (N,)
        kinds[damage] = {f"sensitivity/{damage}": lost, f"sensitivity/{damage}_share": lost > 0}, _clusters(own)
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
        "visibility/tau": _ratio(np.nan_to_num(taus), ~np.isnan(taus)),
        "visibility/ordered": np.array([(np.diff(row) < 0).all() for row in logps], dtype=np.float64),
    }


def yes_no(basic: Sequence[str | None], hallucinated: Sequence[str | None]) -> Rows:
    """VideoHallucer's measures; a row is a pair of questions.

    `basic` and `hallucinated` are what was answered to the two questions of each pair: "yes", "no" or neither. The
    first is right with yes, the second with no.

    Its total is the mean over its five kinds of hallucination, which are of equal size: the same as over all pairs.
    The bias figures follow their definitions (HallusionBench, arXiv 2310.14566, Eq. 6 and 7); VideoHallucer's
    `evaluation_bias.py` differs where the hallucinated question is answered wrongly.
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


def binary(records: Records, said: Sequence[str | None]) -> Rows:
    """Return POPE's measures of single yes/no questions, and AMBER's, for which "no" is the positive answer.

    `said` is what was answered to each: "yes", "no" or neither, which is wrong, and not found by any recall. POPE: Li et
    al. 2023, arXiv 2305.10355, RUCAIBox/POPE@3df3ba1, evaluate.py. AMBER: Wang et al. 2023, arXiv 2311.07397,
    junyangwang0410/AMBER@534babf, inference.py.
    """
    rows = {"binary/accuracy": np.array([one == r["expected"] for one, r in zip(said, records, strict=True)])}
    for positive, end in (("yes", ""), ("no", "_no")):
        answered = np.array([one == positive for one in said])
        true = np.array([r["expected"] == positive for r in records])
        rows[f"binary/precision{end}"] = _ratio(answered & true, answered)
        rows[f"binary/recall{end}"] = _ratio(answered & true, true)
        rows[f"binary/f1{end}"] = _ratio(2 * (answered & true), answered.astype(int) + true)
    return rows | {
        "binary/yes_rate": np.array([one == "yes" for one in said]),
        "binary/unparsed": np.array([one is None for one in said]),
        "binary/cut_off": _cut_off(records),
    }


def question_sets(records: Records, rule: str) -> Evidence:
    """Return for each kind of sets which of them are right: all of their rows are.

    Where questions are in sets of the kinds "in_video" and "out_video", as in ELV-Halluc, also its SAH ratio: how many
    of those that fail within the video pass with what is not in it (Lu et al. 2025, arXiv 2508.21496,
    hlsv02/ELV-Halluc@be7ff84, eval.py); both kinds then have the same names.
    """
    kinds: dict[str, dict[str, list[Mapping]]] = {}
    for record in records:
        for kind, name in record.get("sets", {}).items():
            kinds.setdefault(kind, {}).setdefault(name, []).append(record)
    right = {
        kind: {name: all(read_answer(r, rule) == r["expected"] for r in rows) for name, rows in sets.items()}
        for kind, sets in kinds.items()
    }
    result: Evidence = {
        f"sets/{kind}": ({f"sets/{kind}": np.array([*right[kind].values()])}, _joined(map(_clusters, sets.values())))
        for kind, sets in kinds.items()
    }
    if names := [name for name in right.get("in_video", ()) if name in right.get("out_video", ())]:
        inside, outside = (np.array([right[kind][name] for name in names], int) for kind in ("in_video", "out_video"))
        clusters = _joined([_clusters(kinds["in_video"][name] + kinds["out_video"][name]) for name in names])
        result["sets/sah_ratio"] = {"sets/sah_ratio": _ratio(outside - inside, 1 - inside)}, clusters
    return result


def choice(records: Records) -> Rows:
    """Multiple choice from free text and by log-prob; an unread letter is wrong."""
    right = [by_letter(r["response"], r["options"], option_index(r)) for r in records]
    rows = {
        "choice/letter": np.array([bool(row) for row in right]),
        "choice/unparsed": np.array([row is None for row in right]),
        "choice/cut_off": _cut_off(records),
    }
    if all("option_logps" in r for r in records):  # a template that opens a thought has no place for an option
        for name, lengths in (("choice/logp", "none"), ("choice/logp_average", "option_tokens")):
            rows[name] = np.array([by_logprob(r["option_logps"], option_index(r), r.get(lengths)) for r in records])
    return rows


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


def read_answer(record: Mapping[str, Any], rule: str) -> str | None:
    """Return what a yes/no row's response says."""
    return read_yes_no(record["response"], rule=rule, expected=record["expected"]).value


def question_pairs(records: Records) -> dict[str, dict[str, Mapping]]:
    """pair -> expected answer -> record, of yes/no rows. A skipped row leaves its pair incomplete."""
    pairs: dict[str, dict[str, Mapping]] = {}
    for record in _of_task(records, "yes_no"):
        if "pair" in record:
            pairs.setdefault(record["pair"], {})[record["expected"]] = record
    return pairs


def _by_group(kind: str, records: Records) -> list[tuple[str, list[Mapping]]]:
    """All records under their kind, then those of each group under a name such as `choice[counting]`."""
    groups: dict[str, list[Mapping]] = {kind: list(records)} if records else {}
    for record in records:
        if "group" in record:
            groups.setdefault(f"{kind}[{record['group']}]", []).append(record)
    return list(groups.items())


def _named(kind: str, rows: Rows) -> Rows:
    """Name the measures of a group after it."""
    return {f"{kind}/{name.split('/', 1)[1]}": values for name, values in rows.items()}


def _of_task(records: Records, task: str) -> list[Mapping]:
    return [record for record in records if record["task"] == task]


def _pair_scores(records: Records) -> list[np.ndarray]:
    """(N,) each: summed log-probs of the chosen and the rejected responses, and their tokens."""
    names = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
    return [np.array([record[name] for record in records], dtype=float) for name in names]


def _cut_off(records: Records) -> np.ndarray:
    return np.array([not record["response_ended"] for record in records])


def _clusters(records: Records) -> list[str]:
    return [record["cluster"] for record in records]


def _joined(sets: Iterable[Sequence[str]]) -> list[str]:
    """One cluster for each pair or set: those of its rows, and all that other sets connect with them, become one.

    What is drawn together must hold all that depends on it.
    """
    above: dict[str, str] = {}

    def top(cluster: str) -> str:
        while above.setdefault(cluster, cluster) != cluster:
            above[cluster] = above[above[cluster]]
            cluster = above[cluster]
        return cluster

    sets = list(sets)
    for first, *others in sets:
        for other in others:
            above[top(other)] = top(first)
    return [top(first) for first, *_ in sets]


# --- arrays ---------------------------------------------------------------------------------------------------------


def _ratio(numerators: Any, denominators: Any) -> np.ndarray:
    return np.stack([numerators, denominators], axis=1).astype(np.float64)  # (N, 2)


def _wins(difference: np.ndarray) -> np.ndarray:
    """1 above 0, 0 below, half for a tie."""
    return (np.sign(difference) + 1) / 2
