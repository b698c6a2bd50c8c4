"""The study's figures, in the style of `trl-vpo plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from studies.testbed.measures import Study
from studies.testbed.plan import SMOOTHED, VARIANTS, Scale, noisy
from trl_vpo.evaluate.measures import Measure
from trl_vpo.report.plot import style
from trl_vpo.report.plot.curves import (
    NATS,
    add_caption,
    add_legend,
    displacement_note,
    draw_line,
    is_mixed,
    smoothing_note,
)
from trl_vpo.report.plot.history import (
    History,
    default_half_life,
    displacement,
    eval_prefixes,
    finite,
    has_displacement,
)

SIDES = ("chosen", "rejected")
SHOWN = ("dpo", "leanpo")  # side by side in the displacement figure
LIST_PANELS = (
    ("chair/s", "CHAIRs", "responses with a false object, %", 100),
    ("visibility/tau", "Visibility", "tau", 1),
)
LISTS = {"lpoi_no_list": 1, "lpoi_2": 2, "lpoi_3": 3, "lpoi_5": 5}


def draw(study: Study, scale: Scale, folder: Path) -> dict[str, str]:
    """Draw what the runs allow into a folder; question -> the Markdown that shows its figure."""
    figures = {}
    if study.has(*SHOWN):
        runs = {VARIANTS[run].name: mean_history(study.histories[run]) for run in SHOWN}
        displacement_figure(runs, folder / "displacement.svg")
        figures["a"] = _shown("displacement", f"{scale.watched} validation clips, mean of {_seeds(scale)}")
    if scale.noise and study.has(*(noisy(key, noise) for key in SMOOTHED for noise in scale.noise)):
        _draw_noise(study, scale, folder / "noise.svg")
        figures["b"] = _shown("noise", "Wrong captions by the share of flipped training pairs")
    if study.has("dpo_scenes", "lpoi_2", "lpoi_5"):
        _draw_lists(study, folder / "lists.svg")
        figures["d"] = _shown("lists", "Hallucinated objects and visibility ranking by the length of the list")
    return figures


def mean_history(histories: Sequence[History]) -> list[dict[str, float]]:
    """The mean log of runs that logged the same metrics at the same steps; what not all of them have is left out."""
    entries: dict[tuple[int, bool], list[dict]] = {}
    for history in histories:
        for entry in history:
            if "train_runtime" not in entry:
                entries.setdefault((entry["step"], any(key.startswith("eval_") for key in entry)), []).append(entry)
    means = []
    for (step, _), found in entries.items():
        if len(found) == len(histories):
            keys = [key for key in found[0] if all(isinstance(one.get(key), (int, float)) for one in found)]
            means.append({key: sum(one[key] for one in found) / len(found) for key in keys} | {"step": step})
    return means


def displacement_figure(runs: Mapping[str, History], out: Path) -> Path:
    """Draw the log-probs of chosen and rejected over training, runs side by side.

    They are of the evaluation set, which has the same rows each time, if every run was evaluated at least three times;
    otherwise of the training rows, smoothed. Runs share one scale if all are measured in the same way: one without a
    reference moves with the rows drawn.

    Raises:
        ValueError: a run logged no log-probs.
    """
    silent = [name for name, log in runs.items() if not any("logps/chosen" in entry for entry in log)]
    if not runs or silent:
        raise ValueError(f"{', '.join(silent) or 'no run given'}: there are no log-probs to draw (logps/chosen)")
    prefixes = {name: (eval_prefixes(log) or [""])[0] for name, log in runs.items()}
    moved = {
        name: [finite(displacement(log, side, prefix=prefixes[name])) for side in SIDES] for name, log in runs.items()
    }
    held_out = all(prefixes.values()) and all(len(sides[0][0]) >= 3 for sides in moved.values())
    if held_out:
        half_life, notes = 0, ["Of the evaluation set, against its log-probs before the first step."]
    else:
        moved = {name: [displacement(log, side) for side in SIDES] for name, log in runs.items()}
        half_life = default_half_life(runs)
        notes = [displacement_note(runs), smoothing_note(half_life)]
    from matplotlib.figure import Figure

    with style.drawing():
        figure = Figure(figsize=(3.6 * len(runs) + 0.4, 3.6), layout="constrained")
        shared = held_out or not is_mixed(runs)
        grid = figure.subplots(1, len(runs), sharey=shared, squeeze=False)[0]
        first = {}
        for axes, (name, sides) in zip(grid, moved.items()):
            if not shared and (other := first.setdefault(has_displacement(runs[name]), axes)) is not axes:
                axes.sharey(other)
            for index, values in enumerate(sides):
                draw_line(axes, values, index, half_life, marked=6 if not held_out else None)
            axes.axhline(0, **style.GUIDE)
            since = "" if shared or has_displacement(runs[name]) else "\nsince the first window"
            axes.set_title(style.literal(name) + since)
            axes.set_xlabel("optimizer step")
        grid[0].set_ylabel(f"Δ log-prob ({NATS})")
        add_legend(figure, SIDES, evaluated=False)
        add_caption(figure, notes)
    return style.save(figure, out)


def _draw_noise(study: Study, scale: Scale, path: Path) -> None:
    from matplotlib.figure import Figure

    noise = (0.0, *scale.noise)
    with style.drawing():
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, (key, weight) in enumerate(SMOOTHED.items()):
            found = [study.of(noisy(key, share), "captions/wrong") for share in noise]
            places = [100 * share + 0.5 * (index - 1) for share in noise]  # beside each other, not on top
            _draw_points(axes, places, found, index, f"smoothing {weight:g}", 100)
        axes.set_xticks([100 * share for share in noise])
        axes.set_xlabel("flipped training pairs, %")
        axes.set_ylabel("wrong captions, %")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=len(SMOOTHED))
    style.save(figure, path)


def _draw_lists(study: Study, path: Path) -> None:
    from matplotlib.figure import Figure

    runs = {run: length for run, length in LISTS.items() if study.has(run)}
    with style.drawing():
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        for axes, (measure, title, unit, factor) in zip(figure.subplots(1, 2), LIST_PANELS):
            _draw_points(axes, list(runs.values()), [study.of(run, measure) for run in runs], 0, "LPOI", factor)
            for index, name in enumerate(("DPO", "base"), start=1):
                found = study.of("dpo_scenes", measure) if name == "DPO" else study.base("scene", measure)
                look = style.look(index)
                axes.axhline(factor * found.value, color=look["color"], linestyle=look["linestyle"], label=name)
            axes.set_title(title)
            axes.set_xlabel("images in the list (1: without list)")
            axes.set_xticks(list(runs.values()))
            axes.set_ylabel(unit)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    style.save(figure, path)


def _draw_points(
    axes, places: Sequence[float], found: Sequence[Measure], index: int, label: str, factor: float
) -> None:
    values = [factor * one.value for one in found]
    below = [max(0.0, value - factor * one.low) for value, one in zip(values, found)]
    above = [max(0.0, factor * one.high - value) for value, one in zip(values, found)]
    axes.errorbar(
        places, values, yerr=[below, above], label=label, **style.look(index), linewidth=1.6, markersize=4.5,
        elinewidth=0.9, capsize=2.5,
    )  # fmt: skip


def _shown(name: str, text: str) -> str:
    return f"![{text}]({name}.svg)\n\n*{text}.*"


def _seeds(scale: Scale) -> str:
    return f"{scale.seeds} seeds" if scale.seeds > 1 else "one seed"
