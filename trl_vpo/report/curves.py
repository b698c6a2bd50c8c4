"""Training curves of one or more runs in one picture: a column for each run, so that no two share an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# Okabe and Ito's palette: told apart with every common kind of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOGPS = {"chosen": ("logps/chosen", "-"), "rejected": ("logps/rejected", "--")}


def series(history: Sequence[Mapping], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric in a trainer's `state.log_history`.

    Entries without it are skipped, and the summary at the end, whose averages are over whatever steps were left.
    """
    points = [(entry["step"], entry[key]) for entry in history if key in entry and "train_runtime" not in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(runs: Mapping[str, Sequence[Mapping]], path: str | Path) -> Path:
    """Draw loss, reward margin and log-probs of each run and save the picture.

    Args:
        runs: name of a run (in the legends) -> its `trainer.state.log_history`.
        path: where the picture goes; the suffix chooses the format.

    The log-probs are sums over a response in nats, averaged over a logging window, minus the run's first window.
    """
    if not runs:
        raise ValueError("there is no run to plot: give at least one name with its log history")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, len(runs), figsize=(3.4 * len(runs) + 0.6, 7.6), sharex="col", squeeze=False, layout="constrained"
    )
    for column, (name, history) in enumerate(runs.items()):
        colour = PALETTE[column % len(PALETTE)]
        _draw_run(axes[:, column], name, history, colour)
    for axis, label in zip(axes[:, 0], ("loss", "reward margin", "log-prob since the start (nats)")):
        axis.set_ylabel(label)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw_run(axes, name: str, history: Sequence[Mapping], colour: str) -> None:
    loss, margin, logps = axes
    loss.plot(*series(history, "loss"), color=colour, label=name)
    margin.plot(*series(history, "rewards/margins"), color=colour, label=name)
    margin.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    for side, (key, style) in LOGPS.items():
        steps, values = series(history, key)
        changes = [value - values[0] for value in values]
        logps.plot(steps, changes, style, color=colour, label=f"{name}, {side}")
    logps.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    loss.set_title(name)
    logps.set_xlabel("optimiser step")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
