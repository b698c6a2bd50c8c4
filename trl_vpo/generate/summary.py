"""The summary of a run as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trl_vpo.runs.console import make_console, table


def show_summary(summary: dict[str, Any], folder: str) -> None:
    """Print counts, reasons and figures of a finished run, and the paths of its files."""
    console = make_console()
    counts = [("kept", summary["kept"])]
    counts += [(f"rejected: {kind}", count) for kind, count in summary["rejected_by_kind"].items()]
    for title, rows in (("Inputs", [*counts, ("all", summary["inputs"])]), ("Data", _flat(summary["figures"] or {}))):
        part = table("", "", title=title, texts=2)  # a list of texts may be long
        part.columns[1].justify = "right"
        for name, value in rows:
            part.add_row(name, _text(value))
        if part.row_count:
            console.print(part)
    lines = []
    if summary["rows"]:
        lines += [f"{summary['rows']} rows to train on: {folder}/rows.jsonl"]
        lines += [f"View them: trl-vpo view {folder} -o page.html"]
    else:
        console.print("No input gave a row: there is nothing to train on.", style="bold red")
    if summary["rejected"]:
        lines += [f"Why inputs were rejected: {folder}/rejected.jsonl"]
    console.print("\n".join(lines), soft_wrap=True)


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
