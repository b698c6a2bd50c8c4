"""`RESULTS.md` and its figure, from the rows of results.jsonl alone. What follows from them is written by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.testbed import plan, tables
from trl_vpo.files import atomic_write

PANELS = {  # measure -> the label of its axis, and what its values are multiplied by
    "chosen_change_right": ("change of log p(chosen), nats", 1),
    "false_mass": ("mass on false sentences, %", 100),
    "outside_mass": ("mass outside of the grammar, %", 100),
}
Rows = Sequence[Mapping[str, Any]]


def write_report(rows: Rows, folder: Path) -> Path:
    """Write RESULTS.md and frontier.svg into a folder, and return the path of the former."""
    near = [row for row in rows if row["pairs"] == "near"]
    frontier_figure(near, folder / "frontier.svg")
    parts = ["# Results on the testbed", opening(rows), "![KL against what it buys](frontier.svg)", CAPTION]
    with atomic_write(folder / "RESULTS.md") as part:
        part.write_text("\n\n".join([*parts, tables.report(rows)]) + "\n", encoding="utf-8")
    return folder / "RESULTS.md"


CAPTION = (
    "*Near pairs. A line for each learning rate, a mark for each checkpoint, means over seeds; the cross is the base.*"
)


def opening(rows: Rows) -> str:
    """Say what was run, and what stands in the tables."""
    runs = plan.full_runs()
    left = plan.missing(runs, rows)
    waiting = [f"{count} on {pairs} pairs" for pairs, count in Counter(run.pairs for run in left).items()]
    unknown = sum(row.get("arithmetic") == "unknown" for row in rows)
    spent = [sum(row["cpu_seconds"].values()) for row in rows if row["steps"] == max(plan.STEPS)]
    lines = [
        "`python -m studies.testbed tables` wrote this file from results.jsonl; what follows from it is in README.md.",
        f"{len(runs) - len(left)} of {len(runs)} runs are done." + (f" Missing: {', '.join(waiting)}." * bool(left)),
        f"{unknown} rows of other runs are in the tables, too. They were made with whatever instructions their "
        "machines have, and `run --full` makes them again." * bool(unknown),
        f"CPU time: {np.mean(spent):.0f} s a run with its checkpoints, of one thread." if spent else "",
        f"A run has {plan.ROWS} pairs, {plan.BATCH} a step, a constant learning rate; {plan.TEST} held-out samples. "
        "Log-probs and KL (base || model, along the chosen response) are nats a caption. True, false, outside: shares "
        "of the probability of each next sentence behind a true beginning. Fell: lost more than 0.1 nat. "
        "Methods are compared at a KL or margin that both reach.",
    ]
    return "\n\n".join(line for line in lines if line)


def frontier_figure(rows: Rows, path: Path) -> None:
    """Draw KL against each of `PANELS`: a line for each method and rate, from the base on."""
    from matplotlib.figure import Figure

    from trl_vpo.report.plot import style

    with style.drawing():
        figure = Figure(figsize=(10.5, 3.8), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for index, method in enumerate(plan.METHODS):
            for rate in sorted({row["rate"] for row in rows if row["method"] == method}):
                _draw(axes, [row for row in rows if (row["method"], row["rate"]) == (method, rate)], index)
        base = next((row for row in rows if row["method"] == "base"), None)
        for own, (measure, (label, scale)) in zip(axes, PANELS.items()):
            own.set(xlabel="KL from the base, nats", ylabel=label, xscale="symlog")
            own.set_xlim(left=0)
            if measure in tables.SIGNED:  # a tenth of a nat and hundreds of them
                own.set_yscale("symlog", linthresh=0.1)
            if base:
                own.plot([0], [scale * base[measure]], "x", color="0.4", markersize=7, clip_on=False)
        figure.legend(*_once(axes[0]), loc="outside upper left", ncols=len(plan.METHODS))
    style.save(figure, path)


def _draw(axes, rows: Rows, index: int) -> None:
    """Draw the checkpoints of a method at one rate, means over seeds, in all panels."""
    from trl_vpo.report.plot import style

    found = [[row for row in rows if row["steps"] == steps] for steps in sorted({row["steps"] for row in rows})]
    mean = lambda of, name: float(np.mean([row[name] for row in of]))  # noqa: E731
    name = plan.ALL[rows[0]["method"]].name
    for own, (measure, (_, scale)) in zip(axes, PANELS.items()):
        points = [(mean(of, "kl"), scale * mean(of, measure)) for of in found]
        own.plot(*zip(*points), label=name, markersize=4.5, linewidth=1, **style.look(index))


def _once(axes) -> tuple[list, list]:
    """Return a handle for each label."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels())))
    return list(found.values()), list(found)
