"""The results of a run as a table, and as `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trl_vpo.runs.results import encode, write_lines

UP, DOWN = "▲", "▼"


def write_results(results: dict[str, Any], folder: str | Path) -> None:
    """Write `results.json`, whole or not at all."""
    write_lines(Path(folder) / "results.json", [encode(results, "results", indent=2)])


def show_results(results: dict[str, Any], folder: str) -> None:
    """Print the table, the number of rows left out, and the paths of the files."""
    console = Console()
    console.print(results_table(results))
    data = results["data"]
    if data["skipped"]:
        text = f"[bold red]{data['skipped']} rows were left out[/]: {escape(folder)}/rejected.jsonl says why"
        pairs = data["incomplete_pairs"]
        console.print(text + (f"; {pairs} pairs of questions are incomplete and not measured." if pairs else "."))
    console.print(f"Numbers: {folder}/results.json\nRows:    {folder}/rows.jsonl", highlight=False, soft_wrap=True)


def results_table(results: dict[str, Any]) -> Table:
    """Return the table of measures by model, with intervals and marks for paired differences to the base."""
    data, contestants = results["data"], results["contestants"].values()
    table = Table(
        title=f"{data['rows']} held-out rows in {data['clusters']} clusters, "
        f"{results['settings']['level']:.0%} intervals",
        caption=f"{UP} above, {DOWN} below the base: the interval of the paired difference excludes 0",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("measure", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in results["contestants"]:
        table.add_column(escape(name), justify="right")
    measures = list(next(iter(contestants))["measures"])
    for before, measure in zip([None, *measures], measures):
        if before and before.split("/")[0] != measure.split("/")[0]:
            table.add_section()
        cells = [_cell(c["measures"][measure], c["differences"].get(measure)) for c in contestants]
        table.add_row(measure, str(max(c["measures"][measure]["n"] for c in contestants)), *cells)
    return table


def _cell(measure: dict[str, Any], difference: dict[str, Any] | None) -> str:
    """Return a text such as `0.640 [0.560, 0.713] ▲`; brackets are escaped for rich."""
    text = _number(measure["value"])
    if measure["low"] is not None:
        text += rf" \[{_number(measure['low'])}, {_number(measure['high'])}]"
    return f"{text} {mark(difference)}"


def mark(difference: dict[str, Any] | None) -> str:
    """Return an arrow if the interval of a difference excludes 0, else a blank."""
    if difference is None or difference["low"] is None:
        return " "
    return UP if difference["low"] > 0 else DOWN if difference["high"] < 0 else " "


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
