"""`trl-vpo plot`: curves of trained runs, as a picture or as an HTML page with their final values and settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_vpo.data.paths import check_output_file
from trl_vpo.errors import PlotError
from trl_vpo.report.html import write_html
from trl_vpo.report.plot import curves, style
from trl_vpo.report.plot.runs import Run, read_runs

NO_METRICS = ("step", "epoch", "total_flos")
NO_SETTINGS = ("output_dir", "run_name", "resume_from_checkpoint")  # they differ, and change nothing
SECTIONS = {  # prefix of a metric: where it is shown
    "": "Training: mean over the last logging window",
    "eval_": "Evaluation: the last one",
    "train_": "The whole run",
}
TEMPLATE = Path(__file__).parent / "plot.html.j2"
Rows = list[tuple[str, list[Any]]]  # a name, and the value of each run


def plot_runs(paths: Sequence[str | Path], out: str | Path, *, names: Sequence[str] | None = None) -> list[str]:
    """Draw runs into one figure (.png, .svg, .pdf) or page (.html) and return the notes on what it shows.

    The page needs no server, no network and no other file. The same runs give the same bytes. `names` stand in the
    place of the runs' methods. Raises PlotError if a folder is not a run, or the file has none of these formats.
    """
    out = Path(out)
    if out.suffix.lower() not in (*style.FORMATS, ".html"):
        raise PlotError(f"{out}: the name must end in {', '.join(style.FORMATS)} or .html.")
    check_output_file(out)
    runs = read_runs(paths, names)
    is_page = out.suffix.lower() == ".html"
    figure, notes = curves.training_figure({run.name: run.history for run in runs}, captioned=not is_page)
    notes += [f"{run.name}: its settings are not known, {run.path} has no run.json." for run in runs if not run.record]
    if not is_page:
        style.save(figure, out)
        return notes
    svg = io.BytesIO()
    with style.drawing():
        figure.savefig(svg, format="svg", metadata=style.METADATA[".svg"])
    write_html(
        out,
        TEMPLATE,
        styles=["plot.css"],
        names=[run.name for run in runs],
        known=[run.name for run in runs if run.record],
        panels=[axes.get_title("left") for axes in figure.get_axes() if axes.axison],
        picture=base64.b64encode(svg.getvalue()).decode(),
        notes=notes,
        facts=facts(runs),
        settings=differing_settings(runs),
        values=final_values(runs),
        show=show_value,
    )
    return notes


def final_values(runs: Sequence[Run]) -> dict[str, Rows]:
    """Return section -> (metric, its last value in each run or None), those that the figure draws first."""
    last: list[dict[str, Any]] = []
    for run in runs:
        last.append({})
        for entry in run.history:
            values = {key: value for key, value in entry.items() if key not in NO_METRICS}
            if "train_runtime" in entry:  # its other averages are over whatever steps were left, see `series`
                values = {k: v for k, v in values.items() if k.startswith("train_") or k not in last[-1]}
            last[-1] |= values
    order = {panel.key: place for place, panel in enumerate(curves.PANELS)}
    keys = {key for values in last for key in values}
    sections: dict[str, Rows] = {name: [] for name in SECTIONS.values()}
    for key in sorted(keys, key=lambda key: (order.get(key.removeprefix("eval_"), len(order)), key)):
        kind = next((prefix for prefix in ("train_", "eval_") if key.startswith(prefix)), "")
        sections[SECTIONS[kind]].append((key, [values.get(key) for values in last]))
    return {name: rows for name, rows in sections.items() if rows}


def facts(runs: Sequence[Run]) -> Rows:
    """Return where each run is, how long it took and on what."""
    records = [run.record for run in runs]
    rows = {
        "method": [run.method or None for run in runs],
        "folder": [str(run.path) for run in runs],
        "last step": [max(entry["step"] for entry in run.history) for run in runs],
        "rows": [r["rows"].get("trained") if isinstance(r.get("rows"), dict) else r.get("rows") for r in records],
        **{key: [record.get(key) for record in records] for key in ("device", "processes", "finished")},
    }
    return [(name, values) for name, values in rows.items() if any(value is not None for value in values)]


def differing_settings(runs: Sequence[Run]) -> Rows:
    """Return the settings and versions in which the runs differ (None: the default); of one run, all that it set.

    Runs whose settings are not known are left out.
    """
    known = [
        dict(run.record.get("recipe") or {})
        | {f"version of {name}": version for name, version in (run.record.get("versions") or {}).items()}
        for run in runs
        if run.record
    ]
    keys = sorted({key for settings in known for key in settings} - set(NO_SETTINGS))
    rows = [(key, [settings.get(key) for settings in known]) for key in keys]
    return [row for row in rows if len(known) == 1 or any(value != row[1][0] for value in row[1])]


def show_value(value: Any) -> str:
    """Return a number with four digits, or in full if it is a count."""
    if isinstance(value, float) and not (value.is_integer() and abs(value) >= 1000):
        return f"{value:.4g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"
