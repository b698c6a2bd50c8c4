"""The summary of a run as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_summary(summary: dict[str, Any], folder: str) -> None:
    """Print counts, reasons and figures of a finished run, and the paths of its files."""
    console = Console()
    counts = [("kept", summary["kept"])]
    counts += [(f"rejected: {kind}", count) for kind, count in summary["rejected_by_kind"].items()]
    console.print(_table("Inputs", [*counts, ("all", summary["inputs"])]))
    if summary["figures"]:
        console.print(_table("Data", _flat(summary["figures"])))
    lines = []
    if summary["rows"]:
        lines += [f"{summary['rows']} rows to train on: {folder}/rows.jsonl"]
        lines += [f"View them: trl-vpo view {folder} -o page.html"]
    else:
        console.print("[bold red]No input gave a row: there is nothing to train on.[/bold red]")
    if summary["rejected"]:
        lines += [f"Why inputs were rejected: {folder}/rejected.jsonl"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(escape(name), escape(_text(value)))
    return table


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every figure; those of a dictionary one below the other."""
    for key, value in figures.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)
