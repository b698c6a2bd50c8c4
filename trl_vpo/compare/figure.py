"""The figure of a comparison: the curves of its trainings, and what was measured on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_vpo.compare.table import Folders, heading, measured
from trl_vpo.evaluate.results import BASE
from trl_vpo.report.plot import style
from trl_vpo.report.plot.curves import training_figure
from trl_vpo.report.plot.runs import read_runs


def write_figure(results: dict[str, Any], folders: Folders, path: Path) -> list[str]:
    """Draw the figure into a file and return the notes on what it shows."""
    runs = read_runs(list(folders.values()), list(folders))
    models = results["contestants"].items()
    held_out = {
        f"{heading(measure)} (held out)": {name: own["measures"][measure] for name, own in models}
        for measure in measured(results)
    }
    figure, notes = training_figure({run.name: run.history for run in runs}, held_out=held_out, base=BASE)
    style.save(figure, path)
    return notes
