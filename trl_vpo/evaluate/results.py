"""The results of a finished run, from its rows: measures with intervals, and paired differences to the base.

A record is one line of `rows.jsonl`: what one candidate did on one row. Log-probs and KL are in nats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from trl_vpo.data.identity import package_version
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.intervals import Interval
from trl_vpo.evaluate.measures import difference, estimate, evidence
from trl_vpo.evaluate.questions import question_pairs, read
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.chair import ObjectTable

BASE = "base"


class Report:
    """The figures of a run: `trl_vpo.runs.results` calls `select`, then `summarize`.

    `about` is what `results.json` says of each candidate, the base first; the table is of objects, for captions.
    `sets` are those of each row's id, rows that are not asked among them.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        about: dict[str, dict],
        table: ObjectTable | None = None,
        sets: Mapping[str, dict[str, str]] | None = None,
    ):
        self._config, self._about, self._table, self._sets = config, about, table, sets or {}
        self.results: dict[str, Any] = {}  # what `results.json` holds, once `summarize` was called

    def select(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes, with what was read from the answers. Nothing is dropped."""
        rule = self._config.yes_no_rule
        return [replace(o, rows=[read(row, rule, self._table) for row in o.rows]) for o in outcomes]

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Fill `results` and return the counts that `summary.json` also holds."""
        records: dict[str, list[dict]] = {name: [] for name in self._about}
        skipped = [outcome.id for outcome in outcomes if not outcome.rows]
        lost = self._sets.keys() - {outcome.id for outcome in outcomes if outcome.rows}
        broken = {named for name in lost for named in self._sets[name].items()}
        asked = {named for outcome in outcomes for named in self._sets.get(outcome.id, {}).items()}
        for outcome in outcomes:
            for record in outcome.rows:
                if "sets" in record:  # what is left of a set that lacks a row is not the set
                    whole = {kind: name for kind, name in record["sets"].items() if (kind, name) not in broken}
                    record = record | {"sets": whole}
                records[record["contestant"]].append(record)
        base = records[BASE]
        counts = {
            "tasks": dict(Counter(record["task"] for record in base)),
            "clusters": len({record["cluster"] for record in base}),
            "incomplete_pairs": sum(len(pair) < 2 for pair in question_pairs(base).values()),
            "incomplete_sets": len(broken & asked),
        }
        self.results = {
            "trl_vpo": package_version(),
            "settings": asdict(self._config),
            "data": {"rows": len(base), "skipped": len(skipped), **counts},
            "contestants": self._compare(records),
        }
        return counts

    def _compare(self, records: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
        config = self._config
        bootstrap = {"level": config.level, "resamples": config.resamples, "seed": config.seed}
        kinds = {name: evidence(own, records[BASE]) for name, own in records.items()}
        compared = {}
        for name, about in self._about.items():
            own: dict[str, Interval] = {}
            changes: dict[str, Interval] = {}
            for kind, (rows, clusters) in kinds[name].items():
                own |= estimate(rows, clusters, **bootstrap)
                if name != BASE:
                    changes |= difference(kinds[BASE][kind][0], rows, clusters, **bootstrap)
            compared[name] = {**about, "measures": _as_json(own), "differences": _as_json(changes)}
        return compared


def _as_json(named: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    """Limits that are undefined become None: JSON has no nan."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in measure._asdict().items()}
        for name, measure in named.items()
    }
