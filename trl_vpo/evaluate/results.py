"""The results of a finished run, from its rows: measures with intervals, and paired differences to the base.

A record is one line of `rows.jsonl`: what one candidate did on one row. Log-probs and KL are in nats.
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
from trl_vpo.evaluate.measures import Measure, Rows
from trl_vpo.evaluate.rows import TASKS, option_index
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.chair import ObjectTable, read_response
from trl_vpo.text.choices import by_letter, by_logprob
from trl_vpo.text.yes_no import read_yes_no

BASE = "base"
Records = Sequence[Mapping[str, Any]]
Evidence = dict[str, tuple[Rows, list[str]]]  # kind -> rows of measures, and the cluster of each row


class Report:
    """The figures of a run: `trl_vpo.runs.results` calls `select`, then `summarize`.

    Args:
        about: candidate -> what `results.json` says of it; the base comes first.
        table: of objects, for rows with the task "chair".

    Attributes:
        results: what `results.json` holds, once `summarize` was called.
    """

    def __init__(self, config: EvaluateConfig, about: dict[str, dict], table: ObjectTable | None = None):
        self._config, self._about, self._table = config, about, table
        self.results: dict[str, Any] = {}

    def select(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes, with what was read from the answers. Nothing is dropped."""
        return [replace(o, rows=[{**row, **self._read(row)} for row in o.rows]) for o in outcomes]

    def _read(self, record: Mapping[str, Any]) -> dict[str, Any]:
        if record["task"] == "yes_no":
            return {"said": _said(record, self._config.yes_no_rule)}
        if record["task"] == "choice":
            return {"right": by_letter(record["response"], record["options"], option_index(record))}
        if record["task"] == "chair":
            objects = read_response(record["response"], record["objects"], self._table)
            words = {"mentioned": objects.mentioned, "hallucinated": objects.hallucinated}
            return {key: [mention.words for mention in mentions] for key, mentions in words.items()}
        return {}

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Fill `results` and return the counts that `summary.json` also holds."""
        records: dict[str, list[dict]] = {name: [] for name in self._about}
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
            "contestants": self._compare(records),
        }
        return counts

    def _compare(self, records: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
        config = self._config
        bootstrap = {"level": config.level, "resamples": config.resamples, "seed": config.seed}
        kinds = {name: evidence(own, records[BASE], config.yes_no_rule, self._table) for name, own in records.items()}
        compared = {}
        for name, about in self._about.items():
            own: dict[str, Measure] = {}
            changes: dict[str, Measure] = {}
            for kind, (rows, clusters) in kinds[name].items():
                own |= measures.estimate(rows, clusters, **bootstrap)
                if name != BASE:
                    changes |= measures.difference(kinds[BASE][kind][0], rows, clusters, **bootstrap)
            compared[name] = {**about, "measures": _as_json(own), "differences": _as_json(changes)}
        return compared


def _as_json(named: dict[str, Measure]) -> dict[str, dict[str, float | None]]:
    """Limits that are undefined become None: JSON has no nan."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(measure).items()}
        for name, measure in named.items()
    }


# --- evidence -----------------------------------------------------------------------------------------------------


def evidence(
    records: Records, base: Records, rule: str = "videohallucer", table: ObjectTable | None = None
) -> Evidence:
    """Return the rows of all measures that a candidate's records give; a kind without rows is left out.

    Args:
        records, base: of the same rows in the same order.
        rule: how a yes or a no is read.
    """
    tasks: dict[str, list] = {task: [r for r in records if r["task"] == task] for task in TASKS}
    preferences, chair, choice = tasks["preference"], tasks["chair"], tasks["choice"]
    kinds = preference_evidence(preferences, [r for r in base if r["task"] == "preference"])
    if lists := [r for r in preferences if r.get("image_logps")]:
        kinds["visibility"] = measures.visibility([r["image_logps"] for r in lists]), _clusters(lists)
    if pairs := [(pair["yes"], pair["no"]) for pair in _pairs(records).values() if len(pair) == 2]:
        kinds["yes_no"] = _yes_no(pairs, rule), _joined([_clusters(pair) for pair in pairs])
    if choice:
        kinds["choice"] = _choice(choice), _clusters(choice)
    if chair:
        objects = [read_response(r["response"], r["objects"], table) for r in chair]
        kinds["chair"] = measures.chair(objects), _clusters(chair)
    if answers := [r for r in records if r["task"] in ("chair", "preference") and "response" in r]:
        rows = measures.lengths([r["response"] for r in answers], [r["response_tokens"] for r in answers])
        rows |= measures.cut_off("length", [r["response_ended"] for r in answers])
        kinds["answers"] = rows, _clusters(answers)
    return kinds


def preference_evidence(records: Records, base: Records | None) -> Evidence:
    """Return the evidence of preference rows: log-probs, sensitivity; with a base also movement and KL."""
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
    kinds = {"preference": (rows, _clusters(records))}
    for damage in dict.fromkeys(damage for record in records for damage in record.get("damaged_logps") or ()):
        own = [record for record in records if damage in (record.get("damaged_logps") or ())]
        damaged, pair = np.array([record["damaged_logps"][damage] for record in own]), _pair_scores(own)
        kinds[damage] = measures.sensitivity(damage, pair.chosen, damaged, pair.chosen_tokens), _clusters(own)
    return kinds


def _pair_scores(records: Records) -> measures.PairScores:
    names = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
    return measures.PairScores(*(np.array([record[name] for record in records], dtype=float) for name in names))


def _pairs(records: Records) -> dict[str, dict[str, Mapping]]:
    """pair -> expected answer -> record, of yes/no rows. A skipped row leaves its pair incomplete."""
    pairs: dict[str, dict[str, Mapping]] = {}
    for record in records:
        if record["task"] == "yes_no":
            pairs.setdefault(record["pair"], {})[record["expected"]] = record
    return pairs


def _said(record: Mapping[str, Any], rule: str) -> str | None:
    return read_yes_no(record["response"], rule=rule, expected=record["expected"]).value


def _yes_no(pairs: Sequence[tuple[Mapping, Mapping]], rule: str) -> Rows:
    rows = measures.yes_no(*zip(*([_said(record, rule) for record in pair] for pair in pairs)))
    return rows | measures.cut_off("yes_no", [[record["response_ended"] for record in pair] for pair in pairs])


def _choice(records: Records) -> Rows:
    right = [by_letter(r["response"], r["options"], option_index(r)) for r in records]
    rows = measures.choice_letters(right) | measures.cut_off("choice", [r["response_ended"] for r in records])
    if all("option_logps" in r for r in records):  # a template that opens a thought has no place for an option
        credits = [by_logprob(r["option_logps"], option_index(r)) for r in records]
        average = [by_logprob(r["option_logps"], option_index(r), r["option_tokens"]) for r in records]
        rows |= measures.choice_logps(credits, average)
    return rows


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
