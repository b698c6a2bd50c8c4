"""Tables of the comparison, from its rows alone: every cell, and differences between methods with intervals.

Two methods are compared where they are equally far: after as many steps at one rate, or where their own trade-off
curves (a measure against KL or margin, over all rates and checkpoints) reach the same KL or margin. Intervals are 95 %
over seeds and held-out samples, which are drawn with replacement, independently of each other (pigeonhole bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from studies.results import markdown
from studies.testbed import plan

Rows = Sequence[Mapping[str, Any]]
DRAWS, LEVEL = 1000, 0.95
SHOWN = {
    "accuracy": "preference accuracy",
    "chosen_change": "Δ log p chosen",
    "chosen_change_right": "where the base was right",
    "fell_right": "of these fell",
    "rejected_change": "Δ rejected",
    "kl": "KL",
    "true_mass": "true",
    "false_mass": "false",
    "outside_mass": "outside",
    "hallucination": "false captions",
    "ungrammatical": "not a caption",
    "habit_objects": "missing companion named",
    "absent_yes": "yes to it",
    "present_yes": "yes to what is there",
    "other_yes": "yes to another",
    "visibility": "visibility τ",
    "pairs_made": "pairs made",
    "chosen_true": "true chosen",
    "rejected_true": "true rejected",
}
RETAINED = {
    "open_right": "short answers right",
    "yes_right": "yes is right",
    "no_right": "no is right",
    "scene_hallucination": "false captions of scenes",
    "scene_ungrammatical": "not a caption of a scene",
    "clip_hallucination": "false captions of clips",
    "clip_ungrammatical": "not a caption of a clip",
}
SIGNED = ("chosen_change", "chosen_change_right", "rejected_change")  # nats
NATS = (*SIGNED, "kl")
NUMBERS = {"visibility": 3, "pairs_made": 0}  # their decimals
MATCHED = {"kl": (4.0, 5.0, 6.0), "margin": (14.0, 16.0, 18.0)}  # nats
COMPARED = ("chosen_change_right", "kl", "true_mass", "false_mass", "outside_mass", "hallucination")
OF_HABIT = ("habit_objects", "absent_yes")  # of scenes
CONTRASTS = (
    *((method, "dpo") for method in (*plan.METHODS, *plan.CONTROLS) if method != "dpo"),
    ("rrpo", "leanpo"),
    ("leanpo", "simpo"),
    ("simpo_nll", "simpo"),
    ("leanpo", "simpo_nll"),
    ("leanpo", "sft"),
    ("rrpo", "rrpo_no_kl"),
    ("rrpo", "dpo_kl"),
    ("lpoi_clip", "dpo"),
)
ON_SCENES = (
    ("mdpo", "dpo"),
    ("lpoi_5", "dpo"),
    ("lpoi_2", "mdpo"),
    ("lpoi_5", "mdpo"),
    ("lpoi_5", "lpoi_2"),
    ("lpoi_5", "lpoi_3"),
    ("lpoi_9", "lpoi_5"),
    ("lpoi_5", "lpoi_5_plain"),
)
NOISY = ("wording", "flip20", "flip40", "policy")  # kinds of pairs, each compared with near ones


def report(rows: Rows) -> str:
    """Return all tables as Markdown."""
    groups = {pairs: [row for row in rows if row["pairs"] == pairs] for pairs in _values(rows, "pairs")}
    parts = [f"## Every cell, pairs: {pairs}\n\n{cells(group, SHOWN)}" for pairs, group in groups.items()]
    for pairs, contrasts in {"near": CONTRASTS, "scenes": ON_SCENES}.items():
        found = [differences(_of_method(groups.get(pairs, []), *both)) for both in contrasts]
        if found := list(filter(None, found)):
            parts.append(f"## Differences on {pairs} pairs\n\n" + "\n\n".join(found))
    near = groups.get("near", [])
    found = [differences(_of_pairs(near, groups.get(pairs, []), m)) for pairs in NOISY for m in plan.METHODS]
    if found := list(filter(None, found)):
        parts.append("## Differences from near pairs\n\n" + "\n\n".join(found))
    kept = [cells(groups[pairs], RETAINED) for pairs in ("near", "scenes") if pairs in groups]
    parts.append("\n\n".join(["## What is left of other abilities", *kept]))
    return "\n\n".join(parts)


def cells(rows: Rows, shown: Mapping[str, str]) -> str:
    """Return a line for each method, rate and checkpoint: means over seeds of what these rows have."""
    shown = {name: title for name, title in shown.items() if all(name in row for row in rows)}
    lines = []
    for method in _values(rows, "method"):
        for rate in _values(rows, "rate"):
            for steps in _values(rows, "steps"):
                own = [r for r in rows if (r["method"], r["rate"], r["steps"]) == (method, rate, steps)]
                if own:
                    name = plan.ALL[method].name if method in plan.ALL else "base"
                    means = [_text(name_, np.mean([row[name_] for row in own])) for name_ in shown]
                    lines.append([name, f"{rate:g}", str(steps), str(len(own)), *means])
    return markdown(["method", "rate", "steps", "seeds", *shown.values()], lines)


def _of_method(rows: Rows, *methods: str) -> dict[str, Rows]:
    return {plan.ALL[name].name: [row for row in rows if row["method"] == name] for name in methods}


def _of_pairs(near: Rows, other: Rows, method: str) -> dict[str, Rows]:
    """Return a method's rows on other pairs, and those on near ones at the same cells."""
    there = {(row["rate"], row["steps"]) for row in other}
    near = [row for row in near if (row["rate"], row["steps"]) in there]
    titled = {f"{plan.ALL[method].name} on {rows[0]['pairs']} pairs": rows for rows in (other, near) if rows}
    return {title: [row for row in rows if row["method"] == method] for title, rows in titled.items()}


def differences(sides: Mapping[str, Rows]) -> str:
    """Return a line for each place where two titled sides are equally far, the first minus the second.

    Seeds of which both have every cell count; without one, or with one side only, there is no table.
    """
    seeds = set.intersection(*map(_whole_seeds, sides.values())) if len(sides) == 2 else set()
    if not seeds:
        return ""
    ours, theirs = (Curves([row for row in of if row["seed"] in seeds]) for of in sides.values())
    names = [name for name in (*COMPARED, *OF_HABIT) if all(name in row for of in sides.values() for row in of)]
    lines = []
    for rate, steps in ours.cells:
        if (rate, steps) in theirs.cells:
            place = (rate, steps)
            found = [difference(ours.at(place, name), theirs.at(place, name)) for name in names]
            lines.append([f"rate {rate:g}, {steps} steps", *map(_interval, names, found)])
    for axis, values in MATCHED.items():
        for value in values:
            found = [difference(ours.where(axis, value, n), theirs.where(axis, value, n)) for n in names]
            if np.isfinite([one[0] for one in found]).any():
                lines.append([f"{axis} {value:g}", *map(_interval, names, found)])
    head = f"### {' minus '.join(sides)}\n\nSeeds: {len(seeds)}.\n\n"
    return head + markdown(["at", *(SHOWN[name] for name in names)], lines)


def _whole_seeds(rows: Rows) -> set[int]:
    """Return the seeds that have all cells of a method: those of a study that is not finished are left out."""
    cells_of: dict[int, set] = {}
    for row in rows:
        cells_of.setdefault(row["seed"], set()).add((row["rate"], row["steps"]))
    return {seed for seed, own in cells_of.items() if own == set.union(*cells_of.values())}


class Curves:
    """The cells of one method under 1,000 draws of seeds and samples; the first draw is the data as they are.

    Two methods meet the same draws, so that their differences are paired by seed and sample.
    """

    def __init__(self, rows: Rows):
        self.cells = sorted({(row["rate"], row["steps"]) for row in rows})
        seeds = sorted({row["seed"] for row in rows})
        by_cell = {((row["rate"], row["steps"]), row["seed"]): row for row in rows}
        self.cells = [cell for cell in self.cells if all((cell, seed) in by_cell for seed in seeds)]
        self._rows = {cell: [by_cell[cell, seed] for seed in seeds] for cell in self.cells}
        self._seeds, self._samples = len(seeds), len(rows[0]["samples"]["kl"])
        self.at = cache(self._at)  # every place on a curve needs the same cells

    def _at(self, cell: tuple[float, int], measure: str) -> np.ndarray:
        """Return a measure of a cell (draws,)."""
        values, counted = (np.array(side) for side in zip(*(_of(row, measure) for row in self._rows[cell])))
        random = np.random.default_rng(0)
        seeds = random.multinomial(self._seeds, [1 / self._seeds] * self._seeds, size=DRAWS)
        samples = random.multinomial(self._samples, [1 / self._samples] * self._samples, size=DRAWS)
        seeds[0], samples[0] = 1, 1
        above = np.einsum("ds,sn,dn->d", seeds, values * counted, samples)
        return above / np.einsum("ds,sn,dn->d", seeds, counted, samples)

    def where(self, axis: str, value: float, measure: str) -> np.ndarray:
        """Return a measure where the curve over all cells reaches a value on an axis (draws,); nan beyond its ends."""
        places = np.stack([self.at(cell, axis) for cell in self.cells])  # (cells, draws)
        values = np.stack([self.at(cell, measure) for cell in self.cells])
        order = places.argsort(axis=0)
        places, values = np.take_along_axis(places, order, 0), np.take_along_axis(values, order, 0)
        drawn = range(places.shape[1])
        return np.array([np.interp(value, places[:, d], values[:, d], left=np.nan, right=np.nan) for d in drawn])


def _of(row: Mapping[str, Any], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a measure's values for each sample, and the samples that count."""
    values = {name: np.array(of) for name, of in row["samples"].items()}
    ones = np.ones(len(values["kl"]))
    if measure == "margin":
        return values["chosen_logp"] - values["rejected_logp"], ones
    if measure == "chosen_change_right":
        return values["chosen_change"], values["right"]
    return values[measure], ones


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Return the difference with its interval; nan where a curve does not reach the place."""
    draws = ours - theirs
    if not np.isfinite(draws[0]) or np.isfinite(draws).mean() < LEVEL:
        return (float("nan"),) * 3
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(draws[0]), float(low), float(high)


def _interval(name: str, found: tuple[float, float, float]) -> str:
    if not np.isfinite(found[0]):
        return "not reached"
    scale, digits = (1, 2) if name in NATS else (100, 1)
    value, low, high = (f"{scale * one:+.{digits}f}" for one in found)
    return f"{value} [{low}, {high}]"


def _text(name: str, value: float) -> str:
    if name in NUMBERS:
        return f"{value:.{NUMBERS[name]}f}"
    if name not in NATS:
        return f"{100 * value:.1f} %"
    return f"{value:+.2f}" if name in SIGNED else f"{value:.2f}"


def _values(rows: Rows, key: str) -> list:
    found = dict.fromkeys(row[key] for row in rows)
    return sorted(found) if key in ("rate", "steps") else list(found)
