"""Measures of questions, a function for each kind, from the records of answers. No model in here.

`read` adds to a record what its answer says, which the measures then count. Rows are (N,) where the measure is their
mean, or (N, 2), numerators and denominators, where it is a ratio of sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_vpo.evaluate.rows import option_index
from trl_vpo.text.chair import ObjectTable, read_response
from trl_vpo.text.choices import by_letter, by_logprob, read_letters
from trl_vpo.text.yes_no import read_yes_no

Records = Sequence[Mapping[str, Any]]
Rows = dict[str, np.ndarray]
Evidence = dict[str, tuple[Rows, list[str]]]  # kind -> rows of measures, and the cluster of each row

_DASH = "[-–—−]"
_RATING = re.compile(  # behind a scale from 0 to 6; a minus, a range or a decimal is none
    rf"rating(?:\W*0 ?(?:{_DASH}|to) ?6\b)?\W*?(?<!{_DASH})([0-6])"
    rf"(?!\w|[.,](?!0\b)\d|{_DASH}\d| {_DASH} \d\b(?!\s+[a-z])| ?(?:to|or) ?\d)",
    re.IGNORECASE,
)


def read(record: Mapping[str, Any], rule: str = "videohallucer", table: ObjectTable | None = None) -> dict[str, Any]:
    """Return a record with what its answer says; `rule` is how yes and no are read, `table` of objects in captions."""
    said: dict[str, Any] = {}
    if record["task"] == "yes_no":
        said["said"] = read_yes_no(record["response"], rule=rule, expected=record["expected"]).value
    elif record["task"] == "choice":
        said["right"] = by_letter(record["response"], record["options"], option_index(record))
    elif record["task"] == "letters":
        said["said"] = read_letters(record["response"], record["letters"], record["ordered"])
    elif record["task"] == "rated":
        said["rating"] = read_rating(record["judgement"])
    elif record["task"] == "chair":
        objects = read_response(record["response"], record["objects"], table)
        said = {key: [mention.words for mention in getattr(objects, key)] for key in ("mentioned", "hallucinated")}
        said |= {key: sorted(getattr(objects, key)) for key in ("covered", "truth")}
    return {**record, **said}


def yes_no(pairs: Sequence[Records]) -> Rows:
    """VideoHallucer's measures of pairs of questions: the basic one is right with yes, the hallucinated one with no.

    Its total is the mean over its five kinds of hallucination, which are of equal size: the same as over all pairs.
    The bias figures follow their definitions (HallusionBench, arXiv 2310.14566, Eq. 6 and 7); VideoHallucer's
    `evaluation_bias.py` differs where the hallucinated question is answered wrongly.
    """
    basic_yes, basic_no, false_yes, false_no = (
        np.array([pair[side]["said"] == word for pair in pairs]) for side in (0, 1) for word in ("yes", "no")
    )
    yes, right = basic_yes.astype(int) + false_yes, basic_yes.astype(int) + false_no  # of two answers
    return {
        "yes_no/basic": basic_yes,
        "yes_no/hallucinated": false_no,
        "yes_no/overall": basic_yes & false_no,
        "yes_no/yes_rate": yes / 2,
        "yes_no/pct_diff": (yes - 1) / 2,
        "yes_no/fp_ratio": ratio(false_yes, 2 - right),
        "yes_no/unparsed": (2 - yes - basic_no - false_no) / 2,
        "yes_no/cut_off": np.array([were_cut_off(pair).mean() for pair in pairs]),
    }


def binary(records: Records) -> Rows:
    """Return POPE's measures of single yes/no questions, and AMBER's, for which "no" is the positive answer.

    An answer that is neither is wrong, and not found by any recall. POPE: Li et al. 2023, arXiv 2305.10355,
    RUCAIBox/POPE@3df3ba1, evaluate.py, which takes all but a no for a yes. AMBER: Wang et al. 2023, arXiv 2311.07397,
    junyangwang0410/AMBER@534babf, inference.py.
    """
    rows = {"binary/accuracy": np.array([r["said"] == r["expected"] for r in records])}
    for positive, end in (("yes", ""), ("no", "_no")):
        answered = np.array([r["said"] == positive for r in records])
        true = np.array([r["expected"] == positive for r in records])
        rows[f"binary/precision{end}"] = ratio(answered & true, answered)
        rows[f"binary/recall{end}"] = ratio(answered & true, true)
        rows[f"binary/f1{end}"] = ratio(2 * (answered & true), answered.astype(int) + true)
    return rows | {
        "binary/yes_rate": np.array([r["said"] == "yes" for r in records]),
        "binary/unparsed": np.array([r["said"] is None for r in records]),
        "binary/cut_off": were_cut_off(records),
    }


def question_sets(records: Records) -> Evidence:
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
        kind: {name: all(r["said"] == r["expected"] for r in rows) for name, rows in sets.items()}
        for kind, sets in kinds.items()
    }
    result: Evidence = {
        f"sets/{kind}": (
            {f"sets/{kind}": np.array([*right[kind].values()])},
            join_clusters(map(row_clusters, sets.values())),
        )
        for kind, sets in kinds.items()
    }
    if names := [name for name in right.get("in_video", ()) if name in right.get("out_video", ())]:
        inside, outside = (np.array([right[kind][name] for name in names], int) for kind in ("in_video", "out_video"))
        clusters = join_clusters([row_clusters(kinds["in_video"][name] + kinds["out_video"][name]) for name in names])
        result["sets/sah_ratio"] = {"sets/sah_ratio": ratio(outside - inside, 1 - inside)}, clusters
    return result


def choice(records: Records) -> Rows:
    """Multiple choice from free text and by log-prob; an unread letter is wrong."""
    rows = {
        "choice/letter": np.array([bool(r["right"]) for r in records]),
        "choice/unparsed": np.array([r["right"] is None for r in records]),
        "choice/cut_off": were_cut_off(records),
    }
    if all("option_logps" in r for r in records):  # a template that opens a thought has no place for an option
        for name, lengths in (("choice/logp", "none"), ("choice/logp_average", "option_tokens")):
            rows[name] = np.array([by_logprob(r["option_logps"], option_index(r), r.get(lengths)) for r in records])
    return rows


def letters(records: Records) -> Rows:
    """Questions with several right letters, or with letters in order: VidHalluc's MCQ and TSH."""
    return {
        "letters/accuracy": np.array([r["said"] == r["expected"] for r in records]),
        "letters/unparsed": np.array([r["said"] is None for r in records]),
        "letters/cut_off": were_cut_off(records),
    }


def rated(records: Records) -> Rows:
    """MMHal-Bench's measures of a judge's ratings; one that cannot be read counts as 0, as in its code."""
    ratings = np.array([r["rating"] or 0 for r in records], dtype=float)
    return {
        "rated/score": ratings,
        "rated/hallucination": ratings < 3,
        "rated/informativeness": np.where(ratings < 3, ratings, ratings - 3) / 3,
        "rated/unread": np.array([r["rating"] is None for r in records]),
        "rated/cut_off": were_cut_off(records),
    }


def chair(records: Records) -> Rows:
    """CHAIR and Cover. Responses that mention nothing, empty ones too, count in `chair/s` and `chair/cover` alone."""
    mentioned, hallucinated, covered, truth = (
        np.array([len(record[name]) for record in records])
        for name in ("mentioned", "hallucinated", "covered", "truth")
    )
    return {
        "chair/i": ratio(hallucinated, mentioned),
        "chair/s": hallucinated > 0,
        "chair/s_mentioning": ratio(hallucinated > 0, mentioned > 0),
        "chair/cover": ratio(covered, truth),
    }


# --- parts ----------------------------------------------------------------------------------------------------------


def read_rating(reply: str) -> int | None:
    """Return the rating from 0 to 6 that a judge's reply gives; None if it gives none, or two different ones."""
    ratings = set(_RATING.findall(reply))
    return int(ratings.pop()) if len(ratings) == 1 else None


def question_pairs(records: Records) -> dict[str, dict[str, Mapping]]:
    """pair -> expected answer -> record, of yes/no rows. A skipped row leaves its pair incomplete."""
    pairs: dict[str, dict[str, Mapping]] = {}
    for record in of_task(records, "yes_no"):
        if "pair" in record:
            pairs.setdefault(record["pair"], {})[record["expected"]] = record
    return pairs


def of_task(records: Records, task: str) -> list[Mapping]:
    return [record for record in records if record["task"] == task]


def were_cut_off(records: Records) -> np.ndarray:
    return np.array([not record["response_ended"] for record in records])


def row_clusters(records: Records) -> list[str]:
    return [record["cluster"] for record in records]


def join_clusters(sets: Iterable[Sequence[str]]) -> list[str]:
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


def ratio(numerators: Any, denominators: Any) -> np.ndarray:
    return np.stack([numerators, denominators], axis=1).astype(np.float64)  # (N, 2)
