"""The results of a run as a table, and as `results.json`."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trl_vpo.runs.console import table
from trl_vpo.runs.results import encode, write_lines

UP, DOWN = "▲", "▼"
FEWEST = 30  # rows that a mark needs; intervals of fewer are too narrow
NAME_WIDTH = 24
_WIDE = Console(width=10_000)  # to measure tables


def write_results(results: dict[str, Any], folder: str | Path) -> None:
    """Write `results.json`, whole or not at all."""
    write_lines(Path(folder) / "results.json", [encode(results, "results", indent=2)])


def show_results(results: dict[str, Any], folder: str) -> None:
    """Print the table, the number of rows left out, and the paths of the files."""
    console = Console()
    for part in results_tables(results, console.width):
        console.print(part)
    data = results["data"]
    if data["skipped"]:
        text = f"[bold red]{data['skipped']} rows were left out[/]: {escape(folder)}/rejected.jsonl says why"
        pairs = data["incomplete_pairs"]
        console.print(text + (f"; {pairs} pairs of questions are incomplete and not measured." if pairs else "."))
    console.print(f"Numbers: {folder}/results.json\nRows:    {folder}/rows.jsonl", highlight=False, soft_wrap=True)


def results_tables(results: dict[str, Any], width: int) -> list[Table]:
    """Return the measures by model, with intervals and marks for paired differences to the base.

    It is one table, or several with fewer models each where one would be too wide: no interval is broken.
    """
    names = list(results["contestants"])
    for size in range(len(names), 0, -1):
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        tables = [_table(results, part, last=part is parts[-1]) for part in parts]
        if size == 1 or max(_WIDE.measure(part).maximum for part in tables) <= width:
            return tables
    return []


def _table(results: dict[str, Any], names: list[str], *, last: bool) -> Table:
    data, models = results["data"], [results["contestants"][name] for name in names]
    marks = f"{UP} above, {DOWN} below the base: the interval of the paired difference excludes 0"
    result = table(
        "measure",
        "n",
        *(escape("\n".join(wrap(name, NAME_WIDTH))) for name in names),
        title=f"{data['rows']} held-out rows in {data['clusters']} clusters, "
        f"{results['settings']['level']:.0%} intervals",
        caption=f"{marks}\n(no marks below n = {FEWEST})" if last else None,
    )
    measures = list(models[0]["measures"])
    for before, measure in zip([None, *measures], measures):
        if before and before.split("/")[0] != measure.split("/")[0]:
            result.add_section()
        cells = [_cell(model["measures"][measure], model["differences"].get(measure)) for model in models]
        result.add_row(measure, str(max(model["measures"][measure]["n"] for model in models)), *cells)
    return result


def _cell(measure: dict[str, Any], difference: dict[str, Any] | None) -> str:
    """Return a text such as `0.640 [0.560, 0.713] ▲`; brackets are escaped for rich."""
    text = _number(measure["value"])
    if measure["low"] is not None:
        text += rf" \[{_number(measure['low'])}, {_number(measure['high'])}]"
    return f"{text} {mark(difference)}"


def mark(difference: dict[str, Any] | None) -> str:
    """Return an arrow if the interval of a difference excludes 0, else a blank; always that for few rows."""
    if difference is None or difference["low"] is None or difference["n"] < FEWEST:
        return " "
    return UP if difference["low"] > 0 else DOWN if difference["high"] < 0 else " "


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
