"""`trl-vpo plot`: curves of trained runs, as a picture or as an HTML page with their final values and settings.

A run is the `output_dir` of `trl-vpo train` or a checkpoint in it, finished or not. Curves come from
trainer_state.json, settings from run.json or from the marker of a checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_vpo.errors import PlotError
from trl_vpo.files import whole
from trl_vpo.report.plot import curves, style
from trl_vpo.report.plot.history import History

STATE = "trainer_state.json"
METHOD_NAMES = {"dpo": "DPO", "leanpo": "LeanPO", "rrpo": "RRPO", "lpoi": "LPOI"}
NO_METRICS = ("step", "epoch", "total_flos")
NO_SETTINGS = ("output_dir", "run_name", "resume_from_checkpoint")  # they differ, and change nothing
SECTIONS = {  # prefix of a metric: where it is shown
    "": "Training: mean over the last logging window",
    "eval_": "Evaluation: the last one",
    "train_": "The whole run",
}
FOLDER = Path(__file__).parent


@dataclass
class Run:
    """A run as its folder tells it.

    Attributes:
        path: as it was given.
        history: `trainer.state.log_history`.
        record: of run.json: method, recipe, versions, ...; empty where nothing tells.
        name: in legends: the method, and the folder where several runs have the same.
    """

    path: Path
    history: History
    record: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def method(self) -> str:
        method = str(self.record.get("method", ""))
        return METHOD_NAMES.get(method, method)


def plot_runs(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    half_life: float | None = None,
) -> list[str]:
    """Draw runs into one figure (.png, .svg, .pdf) or page (.html) and give the notes on what it shows.

    The page needs nothing else: no server, no network, no other file. The same runs give the same bytes.

    Args:
        paths: the runs' folders.
        out: the file to write, whole or not at all; its suffix chooses the format.
        names: of the runs, in place of their methods.
        half_life: of the smoothing, in optimizer steps; 0: none. By default a fortieth of the longest run.

    Raises:
        PlotError: a folder that is no run, or a file that is none of these formats.
    """
    out = Path(out)
    if out.suffix.lower() not in (*style.FORMATS, ".html"):
        raise PlotError(f"{out}: the name must end in {', '.join(style.FORMATS)} or .html.")
    if out.is_dir():
        raise PlotError(f"{out} is a folder: name the file to write.")
    runs = read_runs(paths, names)
    histories = {run.name: run.history for run in runs}
    page = out.suffix.lower() == ".html"
    figure, notes = curves.training_figure(histories, half_life=half_life, captioned=not page)
    notes += [f"{run.name}: its settings are not known, {run.path} has no run.json." for run in runs if not run.record]
    if page:
        _write_page(figure, runs, notes, out)
    else:
        style.save(figure, out)
    return notes


# --- reading ------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Run]:
    """The runs of folders, each with a name of its own.

    Raises:
        PlotError: no run, the same one twice, or one that cannot be read.
    """
    if not paths:
        raise PlotError("there is no run to plot: give the output_dir of at least one.")
    if names is not None and len(names) != len(paths):
        raise PlotError(f"{len(names)} names for {len(paths)} runs: give one for each.")
    twice = [str(path) for path, count in Counter(Path(p).resolve() for p in paths).items() if count > 1]
    if twice:
        raise PlotError(f"{', '.join(twice)} is given twice.")
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, names or _names(runs)):
        run.name = name
    again = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if again:
        raise PlotError(f"two runs are named {again[0]!r}: give each a name of its own.")
    return runs


def read_run(path: str | Path) -> Run:
    """A run from its folder: of its own trainer_state.json and those of its checkpoints, the one written last.

    Raises:
        PlotError: there is none, it cannot be read, or nothing was logged.
    """
    path = Path(path)
    if not path.is_dir():
        raise PlotError(f"{path}: there is no such folder. Give the output_dir of a run of `trl-vpo train`.")
    states = [*path.glob(STATE), *path.glob(f"checkpoint-*/{STATE}")]
    if not states:
        raise PlotError(
            f"{path} has no {STATE}, neither itself nor in a checkpoint: it is no output_dir of a run, or the run "
            "was interrupted before its first checkpoint."
        )
    state = max(states, key=lambda file: (file.stat().st_mtime_ns, file.parent == path))
    history = _read_json(state).get("log_history")
    if not history:
        raise PlotError(f"{state}: nothing was logged. Set logging_steps to less than the number of steps.")
    return Run(path, history, _record(path, state.parent))


def _record(path: Path, written: Path) -> dict[str, Any]:
    """What the run was: of run.json, or of a checkpoint's marker where training has not ended yet."""
    record, marker = path / "run.json", written / "complete.json"
    if written == path and record.is_file():
        return _read_json(record)
    if marker.is_file():
        return _read_json(marker).get("run") or {}
    return _read_json(record) if record.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlotError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise PlotError(f"{path} cannot be read: it holds no JSON object.")
    return found


def _names(runs: Sequence[Run]) -> list[str]:
    """The methods, with as much of the path behind them as tells the runs apart; `run` where no method is known."""
    methods = [run.method or "run" for run in runs]
    parts = [run.path.resolve().parts for run in runs]
    alone = [count == 1 for count in map(Counter(methods).get, methods)]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(runs):
        depth += 1
    tails = ["/".join(part[-depth:]) for part in parts]
    return [m if single and m != "run" else f"{m} ({tail})" for m, single, tail in zip(methods, alone, tails)]


# --- tables ---------------------------------------------------------------------------------------------------------


def final_values(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[Any]]]]:
    """Section -> (metric, its last value in each run or None), those that the figure draws first."""
    last: list[dict[str, Any]] = []
    for run in runs:
        last.append({})
        for entry in run.history:
            summary = "train_runtime" in entry
            last[-1] |= {k: v for k, v in entry.items() if k not in NO_METRICS and (not summary or k[:6] == "train_")}
    drawn = [panel.key for panel in curves.PANELS]
    keys = sorted({k for values in last for k in values}, key=lambda k: (_rank(k.removeprefix("eval_"), drawn), k))
    sections: dict[str, list[tuple[str, list[Any]]]] = {name: [] for name in SECTIONS.values()}
    for key in keys:
        kind = next((prefix for prefix in ("train_", "eval_") if key.startswith(prefix)), "")
        sections[SECTIONS[kind]].append((key, [values.get(key) for values in last]))
    return {name: rows for name, rows in sections.items() if rows}


def _rank(key: str, drawn: Sequence[str]) -> int:
    return drawn.index(key) if key in drawn else len(drawn)


def facts(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(what, of each run): where it is, how long it took, on what."""
    records = [run.record for run in runs]
    found = {
        "method": [run.method or None for run in runs],
        "folder": [str(run.path) for run in runs],
        "last step": [max(entry["step"] for entry in run.history) for run in runs],
        "rows": [r["rows"]["trained"] if isinstance(r.get("rows"), dict) else r.get("rows") for r in records],
        "device": [record.get("device") for record in records],
        "processes": [record.get("processes") for record in records],
        "finished": [record.get("finished") for record in records],
    }
    return [(what, values) for what, values in found.items() if any(value is not None for value in values)]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(setting, its value in each run; None: the default): those in which the runs differ; of one run, all it set.

    Runs whose settings are not known do not make others differ.
    """
    known = [dict(run.record.get("recipe") or {}) | _versions(run.record) for run in runs if run.record]
    keys = [key for key in dict.fromkeys(key for found in known for key in found) if key not in NO_SETTINGS]
    rows = [(key, [found.get(key) for found in known]) for key in sorted(keys)]
    if len(known) > 1:
        rows = [(key, values) for key, values in rows if any(value != values[0] for value in values)]
    return rows


def _versions(record: dict[str, Any]) -> dict[str, Any]:
    return {f"version of {name}": version for name, version in (record.get("versions") or {}).items()}


def show_value(value: Any) -> str:
    """A number with four digits, or in full where it is a count."""
    if isinstance(value, float) and not (value.is_integer() and abs(value) >= 1000):
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


# --- the page -----------------------------------------------------------------------------------------------------


def _write_page(figure: Any, runs: Sequence[Run], notes: list[str], out: Path) -> None:
    import jinja2
    from markupsafe import Markup

    css = "\n" + (FOLDER / "plot.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    svg = io.BytesIO()
    with style.drawing():
        figure.savefig(svg, format="svg", metadata=style.METADATA[".svg"])
    loader = jinja2.FileSystemLoader(FOLDER)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["value"] = show_value
    text = made.get_template("plot.html.j2").render(
        names=[run.name for run in runs],
        known=[run.name for run in runs if run.record],
        panels=[axes.get_title("left") for axes in figure.get_axes() if axes.axison],
        picture=base64.b64encode(svg.getvalue()).decode(),
        notes=notes,
        facts=facts(runs),
        settings=differing_settings(runs),
        values=final_values(runs),
        css=Markup(css),
        css_hash=f"sha256-{digest}",
    )
    with whole(out) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
