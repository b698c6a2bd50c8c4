"""The results of a run as a table."""

from __future__ import annotations

from itertools import chain, groupby
from textwrap import wrap
from typing import Any

from rich.table import Table
from rich.text import Text

from trl_vpo.runs.console import WIDTH, fitting, make_console, table

UP, DOWN = "▲", "▼"
FEWEST = 30  # rows that a mark needs; intervals of fewer are too narrow
NAME_WIDTH = 20


def show_results(results: dict[str, Any], folder: str) -> None:
    """Print the table, what was left out, and the paths of the files."""
    console = make_console()
    console.width = max(console.width, WIDTH)
    for part in results_tables(results, console.width):
        console.print(part)
    data = results["data"]
    if data["skipped"]:
        skipped = Text(f"{data['skipped']} rows were left out", style="bold red")
        console.print(skipped, f": {folder}/rejected.jsonl says why.", sep="", soft_wrap=True)
    if lacking := data["incomplete_pairs"] + data["incomplete_sets"]:
        limit = results["settings"]["limit"]
        why = "rows that were left out" if limit is None else f"rows behind limit {limit}, or that were left out"
        text = f"{lacking} pairs and sets of questions are not measured: they lack {why}."
        console.print(text, style="bold red", soft_wrap=True)
    console.print(f"Numbers: {folder}/results.json\nRows:    {folder}/rows.jsonl", soft_wrap=True)


def results_tables(results: dict[str, Any], width: int) -> list[Table]:
    """Return the measures by model, with intervals and marks for paired differences to the base.

    It is one table, or several with fewer models each where one would be too wide: no interval is broken. The base and
    one adapter fit 80 columns: the parts of a measure's name stand below each other.
    """
    names = list(results["contestants"])
    return fitting(names, lambda part: _table(results, part, last=part[-1] == names[-1]), width)


def _table(results: dict[str, Any], names: list[str], *, last: bool) -> Table:
    data, models = results["data"], [results["contestants"][name] for name in names]
    compared = any(model["differences"] for model in results["contestants"].values())
    marks = f"{UP} above, {DOWN} below the base: the interval of the paired\ndifference excludes 0"
    heads = (("\n".join(wrap(name, NAME_WIDTH)), "") for name in names)  # a mark has a column of its own
    result = table(
        "measure",
        "n",
        *chain.from_iterable(head if model["differences"] else head[:1] for head, model in zip(heads, models)),
        title=f"{data['rows']} held-out rows in {data['clusters']} clusters, "
        f"{results['settings']['level']:.0%} intervals",
        caption=f"{marks} (no marks below n = {FEWEST})" if last and compared else None,
    )
    result.show_edge, result.collapse_padding = False, True
    for head, measures in groupby(map(_parts, models[0]["measures"]), lambda parts: parts[0]):
        result.add_row(head)
        for _, name in measures:
            measure = f"{head}/{name}"
            own = [model["measures"][measure] for model in models]
            cells = [
                (cell(value), *([mark(model["differences"].get(measure))] if model["differences"] else []))
                for value, model in zip(own, models)
            ]
            count = str(max(value["n"] for value in own))
            result.add_row(f"  {name}", count, *chain.from_iterable(cells))
    return result


def _parts(measure: str) -> tuple[str, str]:
    """Return what a measure stands below, and its name there: `binary[a/b]` and `accuracy`, `sets` and `a/b`."""
    head, _, name = measure.partition("/")
    if "[" in head:  # a group, whose name may hold anything
        head, _, name = measure.rpartition("/")
    return head, name


def cell(measure: dict[str, Any]) -> str:
    """Return a text such as `0.640 [0.560, 0.713]`."""
    text = _number(measure["value"])
    if measure["low"] is not None:
        text += f" [{_number(measure['low'])}, {_number(measure['high'])}]"
    return text


def mark(difference: dict[str, Any] | None) -> str:
    """Return an arrow if the interval of a difference excludes 0, else a blank; always that for few rows."""
    if difference is None or difference["low"] is None or difference["n"] < FEWEST:
        return " "
    return UP if difference["low"] > 0 else DOWN if difference["high"] < 0 else " "


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
