"""Training curves: several runs in one figure, from what their trainers logged.

A run is a name and its `trainer.state.log_history`; `trl_vpo.report.plot.runs` reads both from a run's folder.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trl_vpo.errors import PlotError
from trl_vpo.report.plot import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLLOW = {"linestyle": "", "markersize": 6.5, "markerfacecolor": "white", "markeredgewidth": 1.4}
NATS = "nats per response"
SMOOTHED_FROM = 40  # logged points; fewer are drawn as they are
History = Sequence[Mapping[str, Any]]  # a trainer's `state.log_history`
Series = tuple[list[int], list[float]]  # optimizer steps and values of a metric
Measured = Mapping[str, Any]  # value, low and high; each may be None


@dataclass(frozen=True)
class Panel:
    """One set of axes: a metric's key in the logs, a title, the label of its axis, and a line to compare with."""

    key: str
    title: str
    unit: str
    guide: float | None = None


PANELS = (
    Panel("loss", "Loss", "loss"),
    Panel("rewards/margins", "Reward margin", "reward margin", 0.0),
    Panel("rewards/accuracies", "Preference accuracy", "share of pairs", 0.5),
    Panel("displacement/chosen", "Δ log-prob of chosen", "nats above the reference", 0.0),
    Panel("displacement/rejected", "Δ log-prob of rejected", "nats above the reference", 0.0),
    Panel("logps/chosen", "Log-prob of chosen", NATS),
    Panel("logps/rejected", "Log-prob of rejected", NATS),
    Panel("kl/chosen", "KL from the reference, chosen", NATS, 0.0),
    Panel("grad_norm", "Gradient norm, before clipping", "L2 norm"),
)
Curves = Mapping[Panel, Mapping[str, Series]]  # of each run


def training_figure(
    runs: Mapping[str, History],
    *,
    captioned: bool = True,
    held_out: Mapping[str, Mapping[str, Measured]] = MappingProxyType({}),
    base: str = "base",
) -> tuple[Figure, list[str]]:
    """Draw loss, margin, accuracy, log-probs, KL and gradient norm of named runs.

    Return the figure and notes on what it shows, which are also written below the axes if it is `captioned`.
    `held_out` adds measures of the runs and of their `base`: title -> name -> value, with the limits of its interval.
    Raises PlotError if no run logged anything to draw.
    """
    if not runs:
        raise PlotError("there is no run to plot: give at least one")
    half_life = default_half_life(runs)
    curves = {panel: {name: series(history, panel.key) for name, history in runs.items()} for panel in PANELS}
    drawn = [panel for panel, by_run in curves.items() if any(finite(values)[0] for values in by_run.values())]
    if not drawn:
        raise PlotError(f"{', '.join(runs)}: no metric that could be drawn was logged")
    notes = _notes(runs, curves, half_life)
    with style.drawing():
        figure, grid = _grid(len(drawn), len(held_out))
        for axes, panel in zip(grid, drawn):
            for index, (name, history) in enumerate(runs.items()):
                few = len(curves[panel][name][0]) <= SMOOTHED_FROM  # exact as it is, whatever the other runs are
                draw_line(axes, curves[panel][name], index, 0 if few else half_life)
                for prefix in eval_prefixes(history)[:1]:
                    values = finite(series(history, prefix + panel.key))
                    look = style.look(index)
                    axes.plot(*values, color=look["color"], marker=look["marker"], **HOLLOW, zorder=3)
            if panel.guide is not None:
                axes.axhline(panel.guide, **style.GUIDE)
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
        for axes, (title, measures) in zip(grid[len(drawn) :], held_out.items()):
            draw_measures(axes, measures, list(runs), base)
            axes.set_title(title)
        add_legend(figure, runs, evaluated=any(map(eval_prefixes, runs.values())))
        if captioned:
            add_caption(figure, notes)
    return figure, notes


# --- series -------------------------------------------------------------------------------------------------------


def series(history: History, key: str) -> Series:
    """Return the steps and values of one metric.

    Entries without it are skipped. So is the summary at the end, whose averages are over whatever steps were left,
    unless the training ended before its first logging step. Values that are not finite are kept: `finite` leaves
    them out.
    """
    entries = [entry for entry in history if key in entry]
    windows = [entry for entry in entries if "train_runtime" not in entry] or entries
    points = [(entry["step"], entry[key]) for entry in windows]
    return [step for step, _ in points], [float(value) for _, value in points]


def finite(values: Series) -> Series:
    """Return the points that can be drawn."""
    points = [(step, value) for step, value in zip(*values) if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Series, half_life: float) -> Series:
    """Return the exponentially weighted mean of the values so far; a weight halves every `half_life` steps."""
    total = weight = 0.0
    means = []
    before = None
    for step, value in zip(*values):
        decay = 0.0 if before is None else 0.5 ** ((step - before) / half_life)
        total, weight, before = total * decay + value, weight * decay + 1.0, step
        means.append(total / weight)
    return values[0], means


def default_half_life(runs: Mapping[str, History]) -> int:
    """Return a fortieth of the longest run, in steps; 0, which is no smoothing, if few points were logged."""
    logged = [series(history, "loss")[0] for history in runs.values()]
    if max(map(len, logged)) <= SMOOTHED_FROM:
        return 0
    return max(1, round(max(steps[-1] for steps in logged if steps) / SMOOTHED_FROM))


def eval_prefixes(history: History) -> list[str]:
    """Return `eval_`, or `eval_NAME_` for each of several evaluation sets, in the order of the log."""
    keys = dict.fromkeys(key for entry in history for key in entry)
    return [key.removesuffix("loss") for key in keys if key.startswith("eval_") and key.endswith("_loss")]


# --- parts of figures ---------------------------------------------------------------------------------------------


def _grid(curves: int, others: int = 0) -> tuple[Figure, Sequence]:
    """Make a figure with so many axes, in two rows or more if there are four; whole steps stand below curves."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = curves + others
    columns = count if count < 4 else min(math.ceil(count / 2), 5)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.1 * columns + 0.4, 2.5 * rows + 1.0), layout="constrained")
    grid = [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
    for axes in grid[1:curves]:
        axes.sharex(grid[0])
    for axes in grid[:curves]:
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, grid


def draw_line(axes, values: Series, index: int, half_life: float) -> None:
    """Draw a curve, faint as logged and thick as smoothed, with about six markers."""
    look = style.look(index)
    values = finite(values)
    if half_life and len(values[0]) > 1:
        axes.plot(*values, color=look["color"], linewidth=0.7, alpha=0.3)
        values = smooth(values, half_life)
    every = max(1, len(values[0]) // 6)
    axes.plot(*values, **look, linewidth=1.6, markersize=3.5, markevery=(every // 2, every))


def draw_measures(axes, measures: Mapping[str, Measured], names: Sequence[str], base: str) -> None:
    """Draw a measure of each run as a point with its interval, one below the other; the base's is a line."""
    from matplotlib.ticker import MaxNLocator

    for index, name in enumerate(names):
        value, low, high = (measures[name][key] for key in ("value", "low", "high"))
        look = style.look(index)
        if value is not None:
            axes.plot(value, index, color=look["color"], marker=look["marker"], markersize=5)
        if low is not None and high is not None:
            axes.plot([low, high], [index, index], color=look["color"], linewidth=1.6)
    if measures[base]["value"] is not None:
        axes.axvline(measures[base]["value"], **style.GUIDE)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))  # more numbers such as -0.0005 would run together
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("grey: the base")


def add_legend(figure: Figure, names: Iterable[str], *, evaluated: bool) -> None:
    from matplotlib.lines import Line2D

    lines = {style.literal(name): Line2D([], [], **style.look(k), linewidth=1.6) for k, name in enumerate(names)}
    if evaluated:
        lines["hollow: evaluation set"] = Line2D([], [], color="0.4", marker="o", **HOLLOW)
    width = 0.6 + 0.075 * max(map(len, lines))  # inches of an entry, about
    columns = min(len(lines), max(1, int(figure.get_figwidth() / width)))
    figure.legend(lines.values(), lines, loc="outside upper left", ncols=columns, handlelength=3.2)


def add_caption(figure: Figure, notes: Sequence[str]) -> None:
    width = int(figure.get_figwidth() * 17)  # characters of this size that fit
    lines = [line for note in notes for line in textwrap.wrap(note, width)]
    text = style.literal("\n".join(lines))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.35", linespacing=1.4)


# --- notes --------------------------------------------------------------------------------------------------------


def _notes(runs: Mapping[str, History], curves: Curves, half_life: float) -> list[str]:
    steps = f"{half_life:g} step{'s' if half_life != 1 else ''}"
    notes = [f"Faint: as logged. Thick: exponential moving average, half-life {steps}."] if half_life else []
    if len(runs) > 1:
        notes.append("Loss and rewards are each method's own: compare their course, not their height.")
    for panel, by_run in curves.items():
        missing = [name for name, values in by_run.items() if not values[0]]
        if missing:
            names = ", ".join(missing) if len(missing) < len(runs) else "any run"
            notes.append(f"{panel.title}: not logged by {names}.")
        for name, values in by_run.items():
            lost = len(values[0]) - len(finite(values)[0])
            if lost:
                notes.append(
                    f"{panel.title}: nan or infinite, so not drawn: {lost} of {name}'s {len(values[0])} values."
                )
    for name, history in runs.items():
        prefixes = eval_prefixes(history)
        if len(prefixes) > 1:
            notes.append(f"{name}: the evaluation set drawn is {prefixes[0][5:-1]}, one of {len(prefixes)}.")
    return notes
