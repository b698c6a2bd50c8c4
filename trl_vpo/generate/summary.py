"""A run's summary as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_summary(summary: dict[str, Any], folder: str, console: Console | None = None) -> None:
    """Print counts, reasons and figures of a finished run, and where its files are."""
    console = console or Console()
    counts = Table(title="What came of the inputs", box=SIMPLE_HEAD, pad_edge=False)
    counts.add_column("")
    counts.add_column("inputs", justify="right")
    counts.add_row("kept", str(summary["kept"]))
    for kind, count in summary["rejected_by_kind"].items():
        counts.add_row(escape(f"rejected: {kind}"), str(count))
    counts.add_row("all", str(summary["inputs"]), style="bold")
    console.print(counts)
    figures = Table(title="What the data are like", box=SIMPLE_HEAD, pad_edge=False)
    figures.add_column("")
    figures.add_column("", justify="right")
    for name, value in _flat(summary["figures"]):
        figures.add_row(escape(name), escape(value))
    if figures.row_count:
        console.print(figures)
    if summary["rows"]:
        console.print(f"{summary['rows']} rows to train on: {folder}/rows.jsonl", highlight=False, soft_wrap=True)
        console.print(f"To look at them: trl-vpo view {folder} -o page.html", highlight=False, soft_wrap=True)
    else:
        console.print("[bold red]No input gave a row: there is nothing to train on.[/bold red]")
    if summary["rejected"]:
        console.print(f"Why inputs were rejected: {folder}/rejected.jsonl", highlight=False, soft_wrap=True)


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every figure; those of a dictionary one below the other."""
    for key, value in figures.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, list):
            yield name, ", ".join(_text(item) for item in value)
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)
