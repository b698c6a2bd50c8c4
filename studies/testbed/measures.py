"""From the results of the study's jobs to measures with intervals, over seeds and held-out samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from studies.testbed import data as study_data
from studies.testbed.plan import Job
from trl_vpo.evaluate import measures
from trl_vpo.evaluate.measures import Measure, evidence
from trl_vpo.testbed import language, world
from trl_vpo.text.chair import ObjectTable, read_response

Records = Sequence[Mapping[str, Any]]
Rows = dict[str, tuple[np.ndarray, list[str]]]  # measure -> its rows, (N,) or (N, 2), and the cluster of each
RESAMPLES, LEVEL = 2000, 0.95
OBJECTS = ObjectTable({f"{colour} {shape}": () for colour in world.COLOURS for shape in world.SHAPES})


# --- intervals ----------------------------------------------------------------------------------------------------


def over_seeds(
    rows: Sequence[np.ndarray], clusters: Sequence[str], minus: Sequence[np.ndarray] | None = None, seed: int = 0
) -> Measure:
    """A mean (or ratio of sums) over seeds and held-out samples, or its paired difference, with a 95 % interval.

    All seeds are measured on the same samples, so seeds and clusters of samples are drawn independently of each other,
    with replacement: the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", Ann. Appl. Stat. 1, 2007), percentile
    limits. With one seed it is `evaluate.intervals.clustered_bootstrap`, and says nothing about other seeds.

    Args:
        rows: for each seed (N,) or (N, 2), as in `evaluate.measures`.
        clusters: (N,) what each row belongs to.
        minus: what is taken off, for the same seeds and rows.
    """
    columns = np.concatenate([_columns(side) for side in ((rows,) if minus is None else (rows, minus))], axis=2)
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    members = [numbers[cluster] for cluster in clusters]
    sums = np.zeros((len(numbers), *columns.shape[::2]))  # (C, S, K)
    np.add.at(sums, members, columns.swapaxes(0, 1))
    value = _value(columns)
    rests = (columns[:, :, 1::2] > 0).any(axis=2)  # (S, N)
    if max(sums.shape[:2]) < 2:
        return Measure(float(value), math.nan, math.nan, int(rests.sum()))
    random = np.random.default_rng(seed)
    drawn = [random.multinomial(count, [1 / count] * count, size=RESAMPLES) for count in sums.shape[:2]]
    totals = np.einsum("rc,csk->rsk", drawn[0].astype(float), sums, optimize=True)
    draws = _quotient((totals * drawn[1][:, :, None]).sum(axis=1))  # (R,)
    draws = draws[np.isfinite(draws)]
    limits = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(draws) else (math.nan, math.nan)
    return Measure(float(value), float(limits[0]), float(limits[1]), int(rests.sum()))


def _columns(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(S, N, 2): numerators and denominators; those of a mean are 1."""
    stacked = np.stack([np.asarray(one, dtype=np.float64) for one in rows])
    return np.stack([stacked, np.ones_like(stacked)], axis=2) if stacked.ndim == 2 else stacked


def _value(columns: np.ndarray) -> np.ndarray:
    return _quotient(columns.sum(axis=(0, 1)))


def _quotient(sums: np.ndarray) -> np.ndarray:
    """(..., 2) -> ratio; (..., 4) -> first ratio minus the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(sums[..., 1::2] != 0, sums[..., ::2] / sums[..., 1::2], math.nan)
    return ratios[..., 0] - ratios[..., 1] if ratios.shape[-1] == 2 else ratios[..., 0]


# --- one result ---------------------------------------------------------------------------------------------------


def measure_rows(records: Records, base: Records, facts: Mapping[str, Mapping[str, Any]]) -> Rows:
    """The rows of all measures of one run.

    Args:
        records: of the run; `base`: of the base on the same rows, and perhaps on more.
        facts: what is true of each row.

    Measures of the balanced part have their names of `evaluate.measures`, and `captions/*`; others begin with the
    part's name. `kept/right`: of all questions and captions of kinds that were not trained on.
    """
    before = {record["id"]: record for record in base}
    found: Rows = {}
    for part in dict.fromkeys(facts[record["id"]]["part"] for record in records):
        own = [_clustered(record) for record in records if facts[record["id"]]["part"] == part]
        kinds = evidence(own, [_clustered(before[record["id"]]) for record in own])
        rows = {name: (values, clusters) for kind, clusters in kinds.values() for name, values in kind.items()}
        if part != "yes_no":
            rows |= _answers(own, facts)
        if part == "balanced":
            rows |= _by_rank(own, before)
        found |= {name if part in ("balanced", "yes_no") else f"{part}/{name}": rows[name] for name in rows}
    return found | _kept(found)


def _clustered(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "cluster": record.get("pair") or record["id"]}


def _answers(records: Records, facts: Mapping[str, Mapping[str, Any]]) -> Rows:
    """The model's answers against the truth."""
    clusters, texts = [record["id"] for record in records], [record["response"] for record in records]
    things = [study_data.things_of(facts[name]) for name in clusters]
    verdicts = [language.check_caption(text, seen) for text, seen in zip(texts, things)]
    objects = [read_response(text, [thing.name for thing in seen], OBJECTS) for text, seen in zip(texts, things)]
    rows = {
        "captions/hallucinated": np.array([v.hallucinated for v in verdicts], dtype=float),
        "captions/unparsed": np.array([not v.parsed for v in verdicts], dtype=float),
        "captions/wrong": np.array([v.hallucinated or not v.parsed for v in verdicts], dtype=float),
        "right": np.array([text == facts[name]["answer"] for name, text in zip(clusters, texts)], dtype=float),
        **measures.chair(objects),
    }
    return {name: (np.asarray(values, dtype=float), clusters) for name, values in rows.items()}


def _by_rank(records: Records, before: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Displacement and KL of the chosen response, apart for pairs that the base ranked rightly and wrongly."""
    base = [before[record["id"]] for record in records]
    moved = np.array([r["chosen_logp"] - b["chosen_logp"] for r, b in zip(records, base)])
    kl = np.array([record["chosen_kl"] for record in records])
    ranked = np.array([b["chosen_logp"] > b["rejected_logp"] for b in base])
    clusters = [record["id"] for record in records]
    sides = {"right": ranked, "wrong": ~ranked}
    return {
        f"{name}_base_{side}": (np.stack([values * mask, mask], axis=1).astype(float), clusters)
        for side, mask in sides.items()
        for name, values in (("displacement/chosen", moved), ("kl/chosen", kl))
    }


def _kept(found: Rows) -> Rows:
    names = ("questions/right", "yes_no/basic", "yes_no/hallucinated", "other/right")
    own = [found[name] for name in names if name in found]
    if len(own) < len(names):
        return {}
    values = np.concatenate([np.asarray(rows, dtype=float) for rows, _ in own])
    return {"kept/right": (values, [cluster for _, clusters in own for cluster in clusters])}


# --- all results --------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """The final runs of a study.

    Attributes:
        runs: name -> the rows of its measures, for each seed.
        bases: kind -> the base's.
        kinds: name -> the kind of samples it was trained on.
        histories: name -> the trainer's log, for each seed.
        generated: name -> what the pipeline said of self-made data, for each seed.
        left_out: names of runs of which some seed has no model; they are in no table.
    """

    runs: dict[str, list[Rows]] = field(default_factory=dict)
    bases: dict[str, Rows] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    histories: dict[str, list[list[dict]]] = field(default_factory=dict)
    generated: dict[str, list[dict]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def of(self, run: str, measure: str) -> Measure:
        rows, clusters = self._rows(run, measure)
        return over_seeds(rows, clusters)

    def values(self) -> dict[str, dict[str, float]]:
        """Run -> measure -> its value, of all that was measured; those of the base under its kind."""
        runs = {**self.runs, **{f"base/{kind}": [rows] for kind, rows in self.bases.items()}}
        return {
            run: {name: float(_value(_columns([one[name][0] for one in rows]))) for name in rows[0]}
            for run, rows in runs.items()
        }

    def difference(self, run: str, other: str, measure: str) -> Measure:
        """`run` minus `other` ("base": that of its kind), paired by seed and held-out sample."""
        rows, clusters = self._rows(run, measure)
        if other == "base":
            return over_seeds(rows, clusters, [self.bases[self.kinds[run]][measure][0]] * len(rows))
        return over_seeds(rows, clusters, self._rows(other, measure)[0])

    def base(self, kind: str, measure: str) -> Measure:
        rows, clusters = self.bases[kind][measure]
        return over_seeds([rows], clusters)

    def has(self, *runs: str) -> bool:
        return all(run in self.runs for run in runs)

    def _rows(self, run: str, measure: str) -> tuple[list[np.ndarray], list[str]]:
        found = [rows[measure] for rows in self.runs[run]]
        return [rows for rows, _ in found], found[0][1]


def read_study(jobs: Sequence[Job], out: Path) -> Study:
    """The results of the final jobs."""
    study, bases = Study(), {}
    for job in jobs:
        if job.settings["train"] is None:
            kind, records = job.settings["held_out"]["kind"], _result(job, out)["records"]
            bases[kind] = records
            study.bases[kind] = measure_rows(records, records, _facts(job, out))
    for job in (job for job in jobs if job.settings["train"]):
        name, result, kind = job.name.split("/", 1)[1], _result(job, out), job.settings["held_out"]["kind"]
        study.kinds[name] = kind
        if result["generated"]:
            study.generated.setdefault(name, []).append(result["generated"])
        if "records" not in result:  # no rows were made to train on, or it diverged
            study.left_out.append(name)
            continue
        rows = measure_rows(result["records"], bases[kind], _facts(job, out))
        rows |= _logged(result["history"], job.settings["train"]["options"].get("label_smoothing", 0.1))
        study.runs.setdefault(name, []).append(rows)
        study.histories.setdefault(name, []).append(result["history"])
    for name in study.left_out:
        study.runs.pop(name, None)
    return study


def _logged(history: Sequence[Mapping[str, Any]], smoothing: float) -> Rows:
    """The trainer's log at each step: the gradient's norm, and LeanPO's share of smoothed pairs."""
    rows = {}
    for name, key, unit in (("grad_norm", "grad_norm", 1.0), ("smoothed", "loss/smoothing", smoothing)):
        values = [entry[key] / unit for entry in history if key in entry] if unit else []
        if values:
            rows[name] = (np.array(values), [f"step {step}" for step in range(len(values))])
    return rows


def read_tuning(jobs: Sequence[Job], out: Path) -> dict[str, dict[float, dict[str, float]]]:
    """Variant -> learning rate -> what it came to on the validation split."""
    tuned: dict[str, dict[float, dict[str, float]]] = {}
    for job in jobs:
        records, shown = _result(job, out).get("records"), {"captions/wrong": 1.0, "preference/accuracy": 0.0}
        if records is not None:  # otherwise it diverged
            rows = measure_rows(records, records, _facts(job, out))
            shown = {name: float(np.mean(rows[name][0])) for name in shown}
        tuned.setdefault(job.name.split("/")[1], {})[job.settings["train"]["options"]["learning_rate"]] = shown
    return tuned


def best_rates(tuned: Mapping[str, Mapping[float, Mapping[str, float]]]) -> dict[str, float]:
    """The rate with the fewest wrong captions; of equal ones that with the higher accuracy, then the smaller one."""
    order = lambda rate, found: (found["captions/wrong"], -found["preference/accuracy"], rate)  # noqa: E731
    return {key: min(rates, key=lambda rate: order(rate, rates[rate])) for key, rates in tuned.items()}


def _result(job: Job, out: Path) -> dict[str, Any]:
    return json.loads(job.result(out).read_text(encoding="utf-8"))


def _facts(job: Job, out: Path) -> dict[str, Any]:
    return json.loads(study_data.held_out_rows(job.settings["held_out"], out / "data")[1].read_text(encoding="utf-8"))
