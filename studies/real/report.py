"""`RESULTS.md` and the figure from the lines of results.jsonl: tables with intervals; no conclusions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from studies.real.model import ANSWER_TOKENS
from studies.real.runs import CHECKPOINTS, METHODS, RATES, SEEDS, Cell, cells, missing
from studies.results import Estimate, markdown, over_seeds
from trl_vpo.files import atomic_write

Result = Mapping[str, Any]
FELL = 0.1  # nats; less is the noise of bfloat16
MARGINS = (0.5, 1, 2, 4, 8)  # of the frontier, nats
MAIN_RATE = 1e-3  # of near and far swaps, and of the texts that are shown
MEASURES: dict[str, tuple[str, Callable[[Result, Result], Sequence[float]]]] = {
    # heading -> what its rows are, and their values from a result and the base's
    "chosen": ("pair", lambda own, base: own["chosen"]),
    "chosen fell": ("pair", lambda own, base: [100.0 * (value < -FELL) for value in own["chosen"]]),
    "rejected": ("pair", lambda own, base: own["rejected"]),
    "margin": ("pair", lambda own, base: np.subtract(own["chosen"], own["rejected"])),
    "KL": ("pair", lambda own, base: own["kl/chosen"]),
    "KL, neutral": ("neutral", lambda own, base: own["kl/neutral"]),
    "rule-written": ("rule", lambda own, base: own["right"]),
    "rule kept": ("rule", lambda own, base: _kept(own, base)),
    "base's log-prob of what is said": ("said", lambda own, base: own["base_logp"]),
    "garbage": ("said", lambda own, base: [100.0 * (p < min(base["base_logp"])) for p in own["base_logp"]]),
    "cut off": ("said", lambda own, base: [100.0 * (tokens == ANSWER_TOKENS) for tokens in own["tokens"]]),
}
UNITS = {"cut off": " %", "chosen fell": " %", "rule kept": " %", "garbage": " %"}
COMPARED = ("chosen", "margin", "KL", "KL, neutral", "rule-written", "base's log-prob of what is said")
CONTRASTS = (
    ("SimPO", "DPO"),
    ("LeanPO", "DPO"),
    ("RRPO", "DPO"),
    ("RRPO, alpha 0", "DPO"),
    ("LeanPO", "SimPO"),
    ("LeanPO", "RRPO"),
    ("RRPO", "RRPO, alpha 0"),
)


def _kept(own: Result, base: Result) -> list[float]:
    """Whether the right sentence is likelier than the wrong one."""
    sides = (np.add(base[side], own[side]) for side in ("right", "wrong"))
    return [100.0 * bool(right > wrong) for right, wrong in zip(*sides)]


class Study:
    """The results by method, rate and steps; means are over the seeds that are there."""

    def __init__(self, results: Sequence[Result], pairs: Sequence[Result]):
        self.base = next((row for row in results if row["method"] == "base"), {})
        self.runs = [row for row in results if row["method"] != "base"]
        self.near = np.array([pair["swap"] == "near" for pair in pairs])
        self.clusters = {
            "pair": [pair["topic"] for pair in pairs]
        }  # the questions about one thing resemble each other

    def found(self, method: str, rate: float, steps: int, seeds: Sequence[int] = SEEDS) -> list[Result]:
        key = (method, rate, steps)
        found = [r for r in self.runs if (r["method"], r["rate"], r["steps"]) == key and r["seed"] in seeds]
        return sorted(found, key=lambda result: result["seed"])

    def rows(self, measure: str, results: Sequence[Result]) -> np.ndarray:
        """Return a measure's values (seeds, held-out rows)."""
        return np.stack([np.asarray(MEASURES[measure][1](one, self.base), float) for one in results])

    def of(self, measure: str, results: Sequence[Result]) -> Estimate:
        rows = self.rows(measure, results)
        return over_seeds(rows, self._clusters(measure, rows))

    def difference(self, measure: str, method: str, other: str, rate: float, steps: int) -> Estimate | None:
        """`method` minus `other`, paired by held-out row, over the seeds that both have."""
        both = {r["seed"] for r in self.found(method, rate, steps)} & {
            r["seed"] for r in self.found(other, rate, steps)
        }
        if not both:
            return None
        own, others = (self.rows(measure, self.found(one, rate, steps, sorted(both))) for one in (method, other))
        return over_seeds(own - others, self._clusters(measure, own))

    def _clusters(self, measure: str, rows: np.ndarray) -> list:
        return self.clusters.get(MEASURES[measure][0]) or list(range(rows.shape[1]))


def write_report(results: Sequence[Result], pairs: Mapping[str, Sequence[Result]], folder: Path) -> Path:
    """Write RESULTS.md and frontier.svg; gives the path of the former."""
    study = Study(results, pairs["held-out"])
    sections = ["# Results on real weights", opening(results, pairs, study)]
    if study.runs:
        frontier_figure(study, folder / "frontier.svg")
        for steps in reversed(CHECKPOINTS):
            sections += [f"## After {steps} steps", overview(study, steps)]
        sections += ["## KL against margin", "![KL against margin](frontier.svg)", frontier(study)]
        sections += ["## Differences, paired by seed and held-out text", differences(study)]
        sections += ["## Near and far swaps", by_swap(study)]
        sections += ["## What is said after training", texts(study)]
    with atomic_write(folder / "RESULTS.md") as part:
        part.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return folder / "RESULTS.md"


# --- sections -----------------------------------------------------------------------------------------------------


def opening(results: Sequence[Result], pairs: Mapping[str, Sequence[Result]], study: Study) -> str:
    left = missing(results)
    total = len(cells())
    done = total - len(left)
    wrong = {split: np.mean([p["base"][1] > p["base"][0] for p in rows]) for split, rows in pairs.items()}
    lines = [
        "`make study-real` wrote this file from results.jsonl; what follows from it is in README.md.",
        f"Runs: {done} of {total}." + (f" Missing: {_named(left)}." if left else ""),
        f"Pairs: {len(pairs['train'])} for training, {len(pairs['held-out'])} held out, on other topics. The base "
        f"finds the swapped answer likelier in {100 * wrong['train']:.0f} % and {100 * wrong['held-out']:.0f} %.",
    ]
    if study.base:
        said = study.base["base_logp"]
        lengths = study.base["length/chosen"]
        lines.append(
            f"The base's own answers: {np.mean(said):.2f} nats per token, the least likely one {min(said):.2f}; a "
            f"chosen answer has {np.mean(lengths):.0f} tokens. Of the {len(study.base['right'])} rule-written "
            f"sentences it ranks {100 * np.mean(np.greater(study.base['right'], study.base['wrong'])):.0f} % rightly."
        )
    if study.runs:
        spent = [sum(row["cpu_seconds"].values()) for row in study.runs]
        lines.append(f"CPU time: {sum(spent) / max(done, 1):.0f} s a run, of one thread.")
    return "\n\n".join(lines)


def _named(left: Sequence[Cell]) -> str:
    """The runs that are missing, by rate and seed."""
    groups: dict[str, list[str]] = {}
    for cell in left:
        groups.setdefault(f"at {cell.rate:g}, seed {cell.seed}", []).append(cell.method)
    return "; ".join(f"{where}: {'all' if len(g) == len(METHODS) else ' and '.join(g)}" for where, g in groups.items())


def overview(study: Study, steps: int) -> str:
    """All methods and rates at a checkpoint, means over seeds, with intervals."""
    rows = []
    for method in METHODS:
        for rate in sorted(RATES):
            if results := study.found(method, rate, steps):
                cells = [shown(study.of(measure, results), UNITS.get(measure, "")) for measure in MEASURES]
                rows.append([method, f"{rate:g}", str(len(results)), *cells])
    return markdown(["", "rate", "seeds", *MEASURES], rows)


def frontier(study: Study) -> str:
    """The least KL with which a method reached a margin, over rates, seeds and checkpoints."""
    rows = []
    for method in METHODS:
        points = [
            (float(study.of("margin", [r]).value), float(study.of("KL", [r]).value))
            for r in study.runs
            if r["method"] == method
        ]
        rows.append([method, *(least(points, margin) for margin in MARGINS)])
    return "The least KL of any checkpoint with at least this margin (–: none has it).\n\n" + markdown(
        ["", *(f"{margin} nats" for margin in MARGINS)], rows
    )


def least(points: Sequence[tuple[float, float]], margin: float) -> str:
    reached = [kl for found, kl in points if found >= margin]
    return f"{min(reached):.1f}" if reached else "–"


def differences(study: Study) -> str:
    rows = []
    for steps, rate in product(CHECKPOINTS, sorted(RATES)):
        for method, other in CONTRASTS:
            found = [study.difference(measure, method, other, rate, steps) for measure in COMPARED]
            if found[0] is not None:
                cells = (shown(one, signed=True) for one in found)
                rows.append([f"{method} − {other}", f"{rate:g}", str(steps), *cells])
    return markdown(["", "rate", "steps", *COMPARED], rows)


def by_swap(study: Study) -> str:
    """The changes of near and far pairs apart."""
    rows = []
    for method in METHODS:
        for steps in CHECKPOINTS:
            if results := study.found(method, MAIN_RATE, steps):
                sides = [study.rows(measure, results) for measure in ("chosen", "margin")]
                cells = [
                    f"{side[:, kind].mean():+.1f}".replace("-", "−")
                    for kind in (study.near, ~study.near)
                    for side in sides
                ]
                rows.append([method, str(steps), *cells])
    heads = ["", "steps", "chosen, near", "margin, near", "chosen, far", "margin, far"]
    return f"Held-out pairs, at {MAIN_RATE:g}.\n\n" + markdown(heads, rows)


def texts(study: Study) -> str:
    """What the base and each method say to the same prompts."""
    lines = []
    for steps in reversed(CHECKPOINTS):
        runs = [(method, study.found(method, MAIN_RATE, steps, SEEDS[:1])) for method in METHODS]
        for prompt, own in study.base["said"].items() if any(found for _, found in runs) else ():
            lines.append(f"**{prompt}** ({steps} steps at {MAIN_RATE:g}, seed {SEEDS[0]})")
            said = [("base", own)] + [(method, found[0]["said"][prompt]) for method, found in runs if found]
            lines.append("\n".join(f"- {name}: {' '.join(text.split())}" for name, text in said))
    return "\n\n".join(lines)


def shown(found: Estimate, unit: str = "", *, signed: bool = False) -> str:
    text = lambda value: f"{value:{'+' if signed else ''}.1f}".replace("-", "−")  # noqa: E731
    return f"{text(found.value)}{unit} [{text(found.low)}, {text(found.high)}]"


def frontier_figure(study: Study, path: Path) -> None:
    """KL against margin: a point for each rate and checkpoint, joined within a method by margin."""
    from matplotlib.figure import Figure

    from trl_vpo.report.plot import style

    with style.drawing():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, method in enumerate(METHODS):
            found = [study.found(method, rate, steps) for rate in RATES for steps in CHECKPOINTS]
            points = sorted((study.of("margin", r).value, study.of("KL", r).value) for r in found if r)
            if points:
                axes.plot(*zip(*points), label=method, markersize=5, linewidth=1.2, **style.look(index))
        axes.set(xlabel="margin gained on held-out pairs, nats", ylabel="KL from the base, nats a response")
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=5)
    style.save(figure, path)
