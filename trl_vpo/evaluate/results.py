"""From the rows of a finished run to its results: measures with intervals, and paired differences to the base.

A record is one line of `rows.jsonl`: what one contestant did on one held-out row. Log-probs and KL are in nats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from trl_vpo.data.identity import package_version
from trl_vpo.evaluate import measures
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.measures import Rows
from trl_vpo.evaluate.rows import option_index
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.chair import ObjectTable, count_objects, read_response
from trl_vpo.text.choices import by_letter, by_logprob
from trl_vpo.text.yes_no import read_yes_no, score_pairs

BASE = "base"
Records = Sequence[Mapping[str, Any]]
Evidence = dict[str, tuple[Rows, list[str]]]  # kind -> rows of measures, and the cluster of each row


class Report:
    """The last steps of a run, as `generate.store.Run.finish` calls them.

    Args:
        contestants: name -> what is known of it; the base comes first.
        table: of objects, for rows with the task "chair".

    Attributes:
        results: what `results.json` holds, once `summarize` was called.
    """

    def __init__(self, config: EvaluateConfig, contestants: dict[str, dict], table: ObjectTable | None = None):
        self._config, self._contestants, self._table = config, contestants, table
        self.results: dict[str, Any] = {}

    def select(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes, with what was read from the answers. Nothing is dropped."""
        return [replace(o, rows=tuple({**row, **self._read(row)} for row in o.rows)) for o in outcomes]

    def _read(self, record: Mapping[str, Any]) -> dict[str, Any]:
        if record["task"] == "yes_no":
            rule, expected = self._config.yes_no_rule, record["expected"]
            return {"said": read_yes_no(record["response"], rule=rule, expected=expected).value}
        if record["task"] == "choice":
            return {"right": by_letter(record["response"], record["options"], option_index(record))}
        if record["task"] == "chair":
            found = read_response(record["response"], record["objects"], self._table)
            words = {"mentioned": found.mentioned, "hallucinated": found.hallucinated}
            return {key: [mention.words for mention in mentions] for key, mentions in words.items()}
        return {}

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Fill `results`; gives the counts that `summary.json` also holds."""
        records: dict[str, list[dict]] = {name: [] for name in self._contestants}
        for outcome in outcomes:
            for record in outcome.rows:
                records[record["contestant"]].append(record)
        base = records[BASE]
        counts = {
            "tasks": dict(Counter(record["task"] for record in base)),
            "clusters": len({record["cluster"] for record in base}),
            "incomplete_pairs": sum(len(pair) < 2 for pair in _pairs(base).values()),
        }
        skipped = sum(not outcome.rows for outcome in outcomes)
        self.results = {
            "trl_vpo": package_version(),
            "settings": asdict(self._config),
            "data": {"rows": len(base), "skipped": skipped, **counts},
            "contestants": self._compared(records),
        }
        return counts

    def _compared(self, records: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
        config = self._config
        bootstrap = {"level": config.level, "resamples": config.resamples, "seed": config.seed}
        compared, before = {}, evidence(records[BASE], records[BASE], config.yes_no_rule, self._table)
        for name, about in self._contestants.items():
            found = evidence(records[name], records[BASE], config.yes_no_rule, self._table)
            own: dict[str, Any] = {}
            changes: dict[str, Any] = {}
            for kind, (rows, clusters) in found.items():
                own |= measures.estimate(rows, clusters, **bootstrap)
                if name != BASE:
                    changes |= measures.difference(before[kind][0], rows, clusters, **bootstrap)
            compared[name] = {**about, "measures": _as_json(own), "differences": _as_json(changes)}
        return compared


def _as_json(found: dict[str, measures.Measure]) -> dict[str, dict[str, float | None]]:
    """Limits that are undefined become None: JSON has no nan."""
    undefined = lambda value: isinstance(value, float) and not math.isfinite(value)  # noqa: E731
    return {
        name: {key: None if undefined(value) else value for key, value in asdict(measure).items()}
        for name, measure in found.items()
    }


# --- evidence -----------------------------------------------------------------------------------------------------


def evidence(
    records: Records, base: Records, rule: str = "videohallucer", table: ObjectTable | None = None
) -> Evidence:
    """The rows of all measures that a contestant's records give; a kind without rows is not there.

    Args:
        records, base: of the same held-out rows in the same order.
        rule: how a yes or a no is read.
    """
    of_task = lambda side, task: [record for record in side if record["task"] == task]  # noqa: E731
    preferences = of_task(records, "preference")
    found = preference_evidence(preferences, of_task(base, "preference")) | {
        "visibility": _visibility([r for r in preferences if r.get("image_logps")]),
        "yes_no": _yes_no(_pairs(records), rule),
        "choice": _choice(of_task(records, "choice")),
        "chair": _chair(of_task(records, "chair"), table),
        "answers": _answers([r for r in records if r["task"] in ("chair", "preference") and "response" in r]),
    }
    return {kind: (rows, clusters) for kind, (rows, clusters) in found.items() if clusters}


def preference_evidence(records: Records, base: Records | None) -> Evidence:
    """Of preference rows: preferences, log-probs, movement and KL against the base (None: unknown), sensitivity."""
    if not records:
        return {}
    scores = _pair_scores(records)
    rows = measures.preference(scores) | {
        "logps/chosen": scores.chosen,
        "logps/rejected": scores.rejected,
        "logps/chosen_average": scores.chosen / scores.chosen_tokens,
        "logps/rejected_average": scores.rejected / scores.rejected_tokens,
    }
    if base is not None:
        rows |= measures.movement(scores, _pair_scores(base))
        rows |= measures.divergence([r["chosen_kl"] for r in records], scores.chosen_tokens)
    found = {"preference": (rows, _clusters(records))}
    for kind in dict.fromkeys(kind for record in records for kind in record.get("damaged_logps") or ()):
        own = [record for record in records if kind in (record.get("damaged_logps") or ())]
        logps = {kind: [record["damaged_logps"][kind] for record in own]}
        clean, tokens = ([record[key] for record in own] for key in ("chosen_logp", "chosen_tokens"))
        found[kind] = (measures.sensitivity(clean, logps, tokens), _clusters(own))
    return found


def _pair_scores(records: Records) -> measures.PairScores:
    names = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
    return measures.PairScores(*(np.array([record[name] for record in records]) for name in names))


def _visibility(records: Records) -> tuple[Rows, list[str]]:
    return measures.visibility([record["image_logps"] for record in records]), _clusters(records)


def _pairs(records: Records) -> dict[str, dict[str, Mapping]]:
    """pair -> expected answer -> record, of yes/no rows. A skipped row leaves its pair incomplete."""
    pairs: dict[str, dict[str, Mapping]] = {}
    for record in records:
        if record["task"] == "yes_no":
            pairs.setdefault(record["pair"], {})[record["expected"]] = record
    return pairs


def _yes_no(pairs: dict[str, dict[str, Mapping]], rule: str) -> tuple[Rows, list[str]]:
    whole = [(pair["yes"], pair["no"]) for pair in pairs.values() if len(pair) == 2]
    basic, hallucinated = ([pair[side]["response"] for pair in whole] for side in (0, 1))
    rows = measures.yes_no(score_pairs(basic, hallucinated, rule))
    rows |= measures.cut_off("yes_no", [[record["response_ended"] for record in pair] for pair in whole])
    return rows, _joined([_clusters(pair) for pair in whole])


def _choice(records: Records) -> tuple[Rows, list[str]]:
    right = [by_letter(r["response"], r["options"], option_index(r)) for r in records]
    rows = measures.choice_letters(right) | measures.cut_off("choice", [r["response_ended"] for r in records])
    if all("option_logps" in r for r in records):  # a template that opens a thought has no place for an option
        credits = [by_logprob(r["option_logps"], option_index(r)) for r in records]
        average = [by_logprob(r["option_logps"], option_index(r), r["option_tokens"]) for r in records]
        rows |= measures.choice_logps(credits) | measures.choice_logps(average, average=True)
    return rows, _clusters(records)


def _chair(records: Records, table: ObjectTable | None) -> tuple[Rows, list[str]]:
    if not records:
        return {}, []
    counts, _ = count_objects([r["response"] for r in records], [r["objects"] for r in records], table)
    return measures.chair(counts), _clusters(records)


def _answers(records: Records) -> tuple[Rows, list[str]]:
    """Of free answers, to captions and preference prompts."""
    rows = measures.lengths([r["response"] for r in records], [r["response_tokens"] for r in records])
    return rows | measures.cut_off("length", [r["response_ended"] for r in records]), _clusters(records)


def _clusters(records: Records) -> list[str]:
    return [record["cluster"] for record in records]


def _joined(pairs: Sequence[Sequence[str]]) -> list[str]:
    """One cluster for each pair: those of its two rows, and all that other pairs connect with them, become one.

    What is drawn together must hold all that depends on it.
    """
    above: dict[str, str] = {}

    def top(cluster: str) -> str:
        while above.setdefault(cluster, cluster) != cluster:
            above[cluster] = above[above[cluster]]
            cluster = above[cluster]
        return cluster

    for first, second in pairs:
        above[top(second)] = top(first)
    return [top(first) for first, _ in pairs]
