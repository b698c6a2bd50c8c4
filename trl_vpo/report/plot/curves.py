"""Training curves: several runs in one figure, from what their trainers logged.

A run is a name and its `trainer.state.log_history`; `trl_vpo.report.plot.page` reads both from a run's folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_vpo.report.plot import style
from trl_vpo.report.plot.history import (
    History,
    Series,
    default_half_life,
    displacement,
    eval_prefixes,
    finite,
    has_displacement,
    series,
    smooth,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLLOW = {"linestyle": "", "markersize": 6.5, "markerfacecolor": "white", "markeredgewidth": 1.4}
SIDES = ("chosen", "rejected")
NATS = "nats per response"


@dataclass(frozen=True)
class Panel:
    """One set of axes: a metric's key in the logs, its name, what its axis says, and a line to compare with."""

    key: str
    title: str
    unit: str
    guide: float | None = None


PANELS = (
    Panel("loss", "Loss", "loss"),
    Panel("rewards/margins", "Reward margin", "β · nats", 0.0),
    Panel("rewards/accuracies", "Preference accuracy", "share of pairs", 0.5),
    Panel("displacement/chosen", "Δ log-prob of chosen", NATS, 0.0),
    Panel("displacement/rejected", "Δ log-prob of rejected", NATS, 0.0),
    # Of runs without a reference, beside others that have one: what is noise there would hide the others' course.
    Panel("window/chosen", "Δ chosen since first window", NATS, 0.0),
    Panel("window/rejected", "Δ rejected since first window", NATS, 0.0),
    Panel("kl/chosen", "KL from the reference, chosen", NATS, 0.0),
    Panel("grad_norm", "Gradient norm, before clipping", "L2 norm"),
)


# --- figures ------------------------------------------------------------------------------------------------------


def training_figure(
    runs: Mapping[str, History], *, half_life: float | None = None, captioned: bool = True
) -> tuple[Figure, list[str]]:
    """Loss, margin, accuracy, displacement, KL and gradient norm of the runs: (figure, notes on what it shows).

    Args:
        runs: name of a run (in the legend) -> its log.
        half_life: of the smoothing, in optimizer steps; 0: none. By default `default_half_life`.
        captioned: write the notes below the axes.

    Raises:
        ValueError: no run, or none that logged anything to draw.
    """
    if not runs:
        raise ValueError("there is no run to plot: give at least one name with its log history")
    half_life = default_half_life(runs) if half_life is None else half_life
    mixed = _is_mixed(runs)
    panels = [panel for panel in PANELS if mixed or not panel.key.startswith("window")]
    shown = [(panel, {name: _values(panel, log, mixed=mixed) for name, log in runs.items()}) for panel in panels]
    drawn = [(panel, found) for panel, found in shown if any(finite(values)[0] for values in found.values())]
    if not drawn:
        raise ValueError(f"{', '.join(runs)}: no metric that could be drawn was logged")
    notes = _notes(runs, shown, half_life)
    from matplotlib.figure import Figure

    columns = len(drawn) if len(drawn) < 4 else math.ceil(len(drawn) / 2)
    rows = math.ceil(len(drawn) / columns)
    with style.drawing():
        figure = Figure(figsize=(3.1 * columns + 0.4, 2.5 * rows + 1.0), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, (panel, found) in zip(grid.flat, drawn):
            _draw_panel(axes, panel, found, runs, half_life, mixed=mixed)
        for column in range(columns):
            below = [axes for axes, _ in zip(grid[:, column], range(column, len(drawn), columns))]
            below[-1].set_xlabel("optimizer step")
            below[-1].xaxis.set_tick_params(labelbottom=True)
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        _add_legend(figure, runs, evaluated=any(map(eval_prefixes, runs.values())))
        if captioned:
            _add_caption(figure, notes)
    return figure, notes


def plot_curves(runs: Mapping[str, History], path: str | Path, *, half_life: float | None = None) -> Path:
    """Draw `training_figure` into a .png, .svg or .pdf file.

    Raises:
        ValueError: there is nothing to draw, or the path has another suffix.
    """
    return style.save(training_figure(runs, half_life=half_life)[0], path)


def displacement_figure(runs: Mapping[str, History], out: str | Path, *, half_life: float | None = None) -> Path:
    """The log-probs of chosen and rejected over training, runs side by side; .png, .svg or .pdf.

    Runs share one scale where all are measured in the same way: one without a reference moves with the rows drawn.

    Of the evaluation set where every run was evaluated on it at least three times, which are the same rows each time;
    otherwise of the training rows, smoothed as in `training_figure`.

    Raises:
        ValueError: there is no run, a run logged no log-probs, or the path has another suffix.
    """
    silent = [name for name, log in runs.items() if not any("logps/chosen" in entry for entry in log)]
    if not runs or silent:
        raise ValueError(f"{', '.join(silent) or 'no run given'}: there are no log-probs to draw (logps/chosen)")
    prefixes = {name: (eval_prefixes(log) or [""])[0] for name, log in runs.items()}
    moved = {
        name: [finite(displacement(log, side, prefix=prefixes[name])) for side in SIDES] for name, log in runs.items()
    }
    held_out = all(prefixes.values()) and all(len(found[0][0]) >= 3 for found in moved.values())
    if held_out:
        half_life, notes = 0, ["Of the evaluation set, against its log-probs before the first step."]
    else:
        moved = {name: [displacement(log, side) for side in SIDES] for name, log in runs.items()}
        half_life = default_half_life(runs) if half_life is None else half_life
        notes = [_displacement_note(runs), _smoothing_note(half_life)]
    from matplotlib.figure import Figure

    with style.drawing():
        figure = Figure(figsize=(3.6 * len(runs) + 0.4, 3.6), layout="constrained")
        shared = held_out or not _is_mixed(runs)
        grid = figure.subplots(1, len(runs), sharey=shared, squeeze=False)[0]
        first: dict[bool, Any] = {}
        for axes, (name, found) in zip(grid, moved.items()):
            if not shared and (other := first.setdefault(has_displacement(runs[name]), axes)) is not axes:
                axes.sharey(other)
            for index, values in enumerate(found):
                _draw_line(axes, values, style.look(index), half_life, marked=6 if not held_out else None)
            axes.axhline(0, **style.GUIDE)
            since = "" if shared or has_displacement(runs[name]) else "\nsince the first window"
            axes.set_title(style.literal(name) + since)
            axes.set_xlabel("optimizer step")
        grid[0].set_ylabel(f"Δ log-prob ({NATS})")
        _add_legend(figure, SIDES, evaluated=False)
        _add_caption(figure, notes)
    return style.save(figure, out)


# --- parts of figures -----------------------------------------------------------------------------------------------


def _is_mixed(runs: Mapping[str, History]) -> bool:
    """Whether some of the runs compared themselves with a reference and others did not."""
    return len({has_displacement(history) for history in runs.values()}) == 2


def _values(panel: Panel, history: History, *, mixed: bool, prefix: str = "") -> Series:
    name, _, side = panel.key.partition("/")
    if name in ("displacement", "window"):
        elsewhere = mixed and has_displacement(history) == (name == "window")
        return ([], []) if elsewhere else displacement(history, side, prefix=prefix)
    return series(history, prefix + panel.key)


def _draw_panel(axes, panel: Panel, found: Mapping[str, Series], runs, half_life: float, *, mixed: bool) -> None:
    for index, (name, values) in enumerate(found.items()):
        _draw_run(axes, panel, runs[name], values, index, half_life, mixed=mixed)
    if panel.guide is not None:
        axes.axhline(panel.guide, **style.GUIDE)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)


def _draw_run(axes, panel: Panel, history: History, values: Series, index: int, half_life, *, mixed: bool) -> None:
    """One run: as logged (faint where it is smoothed), the smoothed line, and evaluations as hollow markers."""
    look = style.look(index)
    _draw_line(axes, values, look, half_life)
    for prefix in eval_prefixes(history)[:1]:
        found = finite(_values(panel, history, mixed=mixed, prefix=prefix))
        axes.plot(*found, color=look["color"], marker=look["marker"], **HOLLOW, zorder=3)


def _draw_line(axes, values: Series, look: dict[str, Any], half_life: float, marked: int | None = 6) -> None:
    """A curve with about so many markers; None: one at every point."""
    values = finite(values)
    if half_life and len(values[0]) > 1:
        axes.plot(*values, color=look["color"], linewidth=0.7, alpha=0.3)
        values = smooth(values, half_life)
    every = max(1, len(values[0]) // marked) if marked else 1
    axes.plot(*values, **look, linewidth=1.6, markersize=3.5 if marked else 5, markevery=(every // 2, every))


def _add_legend(figure: Figure, names: Iterable[str], *, evaluated: bool) -> None:
    from matplotlib.lines import Line2D

    lines = {style.literal(name): Line2D([], [], **style.look(k), linewidth=1.6) for k, name in enumerate(names)}
    if evaluated:
        lines["hollow: evaluation set"] = Line2D([], [], color="0.4", marker="o", **HOLLOW)
    width = 0.6 + 0.075 * max(map(len, lines))  # inches of an entry, about
    columns = min(len(lines), max(1, int(figure.get_figwidth() / width)))
    figure.legend(lines.values(), lines, loc="outside upper left", ncols=columns, handlelength=3.2)


def _add_caption(figure: Figure, notes: Sequence[str]) -> None:
    import textwrap

    width = int(figure.get_figwidth() * 17)  # characters of this size that fit
    lines = [line for note in notes for line in textwrap.wrap(note, width)]
    text = style.literal("\n".join(lines))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.35", linespacing=1.4)


# --- notes ----------------------------------------------------------------------------------------------------------


def _notes(runs, shown: Sequence[tuple[Panel, Mapping[str, Series]]], half_life: float) -> list[str]:
    notes = [_smoothing_note(half_life), _displacement_note(runs)]
    if len(runs) > 1:
        notes.append("Loss and rewards are each method's own: compare their course, not their height.")
    for panel, found in shown:
        missing = [name for name, values in found.items() if not values[0]]
        told = _is_mixed(runs) and panel.key.startswith(("displacement", "window"))
        if missing and not told:
            notes.append(
                f"{panel.title}: not logged by {', '.join(missing) if len(missing) < len(runs) else 'any run'}."
            )
        for name, values in found.items():
            lost = len(values[0]) - len(finite(values)[0])
            if lost:
                notes.append(f"{panel.title}: {lost} values of {name} are nan or infinite and not drawn.")
    return [note for note in (*notes, *_eval_notes(runs)) if note]


def _displacement_note(runs: Mapping[str, History]) -> str:
    without = ", ".join(name for name, history in runs.items() if not has_displacement(history))
    exact = "Δ log-prob: against the reference model on the same rows"
    if not without:
        return f"{exact}."
    evaluated = any(map(eval_prefixes, runs.values()))
    also = ", and of the evaluation set since the evaluation before the first step" if evaluated else ""
    rest = f"{exact}; of {without}, " if _is_mixed(runs) else "Δ log-prob: "
    return (
        f"{rest}since the first logging window, whose rows were others{also}: {without} logged no log-probs of a "
        "reference model."
    )


def _smoothing_note(half_life: float) -> str:
    if not half_life:
        return ""
    steps = f"{half_life:g} step{'s' if half_life != 1 else ''}"
    return f"Faint: as logged. Thick: exponential moving average, half-life {steps}."


def _eval_notes(runs: Mapping[str, History]) -> list[str]:
    notes = []
    for name, history in runs.items():
        prefixes = eval_prefixes(history)
        if len(prefixes) > 1:
            notes.append(f"{name}: the evaluation set drawn is {prefixes[0][5:-1]}, one of {len(prefixes)}.")
        if prefixes and not has_displacement(history) and not displacement(history, "chosen", prefix=prefixes[0])[0]:
            notes.append(f"{name}: no log-probs of the evaluation set, it was not evaluated before the first step.")
    return notes
