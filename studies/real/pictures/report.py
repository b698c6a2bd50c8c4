"""`RESULTS.md` of the pictures from the lines of results.jsonl: tables with intervals; no conclusions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.real.pictures.runs import CHECKPOINTS, METHODS, RATE, SEEDS, cells, missing
from studies.real.report import FELL, shown
from studies.results import Estimate, markdown, over_seeds
from trl_vpo.files import atomic_write

Result = Mapping[str, Any]
MEASURES: dict[str, Callable[[Result], Sequence[float]]] = {  # heading -> values of the held-out pairs
    "right": lambda own: _percent(own["right"]),
    "picked": lambda own: _percent(own["picked/chosen"]),
    "picked, other picture": lambda own: _percent(own["picked/other"]),
    "picked, no picture": lambda own: _percent(own["picked/none"]),
    "preferred": lambda own: _percent(np.greater(own["logp/chosen"], own["logp/rejected"])),
    "chosen": lambda own: own["chosen"],
    "chosen fell": lambda own: _percent(np.less(own["chosen"], -FELL)),
    "rejected": lambda own: own["rejected"],
    "margin": lambda own: np.subtract(own["chosen"], own["rejected"]),
    "KL": lambda own: own["kl"],
    "sensitivity": lambda own: np.subtract(own["logp/chosen"], own["logp/other"]),
    "readable": lambda own: _percent(own["readable"]),
}
PERCENT = ("right", "picked", "picked, other picture", "picked, no picture", "preferred", "chosen fell", "readable")
ANSWERS = ("right", "picked", "picked, other picture", "picked, no picture", "preferred", "sensitivity")
CHANGES = ("chosen", "chosen fell", "rejected", "margin", "KL", "readable")
COMPARED = ("right", "picked", "chosen", "margin", "KL", "sensitivity")
KINDS = ("colour", "shape")


def _percent(flags: Sequence[bool]) -> np.ndarray:
    return 100.0 * np.asarray(flags, float)


class Study:
    """The results by method and steps; means are over the seeds that are there."""

    def __init__(self, results: Sequence[Result], held_out: Sequence[Result]):
        self.results = results
        self.kinds = np.array([row["kind"] for row in held_out])

    def found(self, method: str, steps: int, seeds: Sequence[int] = SEEDS) -> list[Result]:
        found = [r for r in self.results if (r["method"], r["steps"]) == (method, steps) and r["seed"] in seeds]
        return sorted(found, key=lambda result: result["seed"])

    def rows(self, measure: str, results: Sequence[Result], kind: str | None = None) -> np.ndarray:
        """Return a measure's values (seeds, held-out pairs)."""
        values = np.stack([np.asarray(MEASURES[measure](one), float) for one in results])
        return values if kind is None else values[:, self.kinds == kind]

    def of(self, measure: str, results: Sequence[Result], kind: str | None = None) -> Estimate:
        """A mean with its interval over seeds and pictures: each has one pair."""
        rows = self.rows(measure, results, kind)
        return over_seeds(rows, range(rows.shape[1]))

    def difference(self, measure: str, method: str, other: str, steps: int) -> Estimate | None:
        """`method` minus `other`, paired by picture, over the seeds that both have; the base is the same for all."""
        own, others = self.found(method, steps), self.found(other, 0 if other == "base" else steps)
        if other != "base":
            both = {r["seed"] for r in own} & {r["seed"] for r in others}
            own, others = ([r for r in side if r["seed"] in both] for side in (own, others))
        if not own or not others:
            return None
        change = self.rows(measure, own) - self.rows(measure, others)
        return over_seeds(change, range(change.shape[1]))


def write_report(results: Sequence[Result], pairs: Mapping[str, Sequence[Result]], folder: Path) -> Path:
    """Write RESULTS.md; gives its path."""
    study = Study(results, pairs["held-out"])
    sections = ["# Results on pictures", opening(results, pairs)]
    if results:
        sections += ["## Answers", answers(study)]
    if len(_all(study)) > 1:
        sections += ["## Changes", changes(study), "## Differences, paired by picture", differences(study)]
        sections += ["## What is said", texts(study, pairs)]
    with atomic_write(folder / "RESULTS.md") as part:
        part.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return folder / "RESULTS.md"


# --- sections -----------------------------------------------------------------------------------------------------


def opening(results: Sequence[Result], pairs: Mapping[str, Sequence[Result]]) -> str:
    left, total = missing(results), len(cells())
    named = ", ".join(f"{cell.method} (seed {cell.seed})" for cell in left)
    lines = [
        "`make study-real` wrote this file from results.jsonl; what follows from it is in ../README.md.",
        f"Runs at {RATE:g}: {total - len(left)} of {total}." + (f" Missing: {named}." if left else ""),
        f"Pairs: {len(pairs['train'])} for training, {len(pairs['held-out'])} held out, each about another picture.",
        blind(pairs["held-out"]),
    ]
    spent = [sum(row["cpu_seconds"].values()) for row in results if row["method"] != "base"]
    if spent:
        lines.append(f"CPU time: {sum(spent) / len({_run(r) for r in results} - {('base', 0)}):.0f} s a run.")
    return "\n\n".join(lines)


def _run(result: Result) -> tuple[str, int]:
    return result["method"], result["seed"]


def blind(held_out: Sequence[Result]) -> str:
    """How often the answer is right that its question has most often in training."""
    right = {kind: [row["answer"] == row["blind"] for row in held_out if row["kind"] == kind] for kind in KINDS}
    shares = ", ".join(f"{kind} {100 * np.mean(own):.0f} %" for kind, own in right.items())
    return f"Always the commonest answer to a question would be right for: {shares}."


def _all(study: Study) -> list[tuple[str, str, list[Result]]]:
    """(name, steps, results) of the base and of all methods."""
    found = [("base", "0", study.found("base", 0))]
    found += [(method, str(steps), study.found(method, steps)) for steps in CHECKPOINTS for method in METHODS]
    return [(name, steps, results) for name, steps, results in found if results]


def answers(study: Study) -> str:
    parts = []
    for kind in KINDS:
        rows = [
            [name, steps, str(len(results)), *(_shown(study, measure, results, kind) for measure in ANSWERS)]
            for name, steps, results in _all(study)
        ]
        parts += [f"Questions about {kind}, {np.sum(study.kinds == kind)} pictures:"]
        parts += [markdown(["", "steps", "seeds", *ANSWERS], rows)]
    return "\n\n".join(parts)


def changes(study: Study) -> str:
    rows = [
        [name, steps, str(len(results)), *(_shown(study, measure, results) for measure in CHANGES)]
        for name, steps, results in _all(study)
        if name != "base"
    ]
    return markdown(["", "steps", "seeds", *CHANGES], rows)


def _shown(study: Study, measure: str, results: Sequence[Result], kind: str | None = None) -> str:
    return shown(study.of(measure, results, kind), " %" if measure in PERCENT else "")


def differences(study: Study) -> str:
    rows = []
    pairs = [(method, "base") for method in METHODS] + [(method, "DPO") for method in METHODS if method != "DPO"]
    for steps in CHECKPOINTS:
        for method, other in pairs:
            found = [study.difference(measure, method, other, steps) for measure in COMPARED]
            if found[0] is not None:
                rows.append([f"{method} − {other}", str(steps), *(shown(one, signed=True) for one in found)])
    return markdown(["", "steps", *COMPARED], rows)


def texts(study: Study, pairs: Mapping[str, Sequence[Result]]) -> str:
    """The first run's answers to the same questions."""
    own = study.found("base", 0)[0]["said"]
    step = max(1, len(pairs["held-out"]) // len(own))
    lines = []
    for place, row in enumerate(pairs["held-out"][::step][: len(own)]):
        said = [f"- {name}, {steps}: {results[0]['said'][place].strip()}" for name, steps, results in _all(study)]
        lines += [f"**{row['question']}** ({row['answer']})", "\n".join(said)]
    return "\n\n".join(lines)
