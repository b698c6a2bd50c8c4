"""The table of a comparison: a line for each model, on the terminal and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from trl_vpo.evaluate.results import BASE
from trl_vpo.evaluate.table import FEWEST, cell, mark
from trl_vpo.files import atomic_write
from trl_vpo.runs.console import WIDTH, fitting, make_console, table

MEASURES = {  # of `trl-vpo evaluate`: their headings, and whether they compare with the base already
    "preference/accuracy": ("preference\naccuracy", False),
    "reward/margin": ("reward\nmargin", True),
    "displacement/chosen": ("Δ logp\nchosen", True),
    "displacement/rejected": ("Δ logp\nrejected", True),
    "kl/chosen": ("KL from\nbase", True),
    "chair/s": ("CHAIRs", False),
    "chair/i": ("CHAIRi", False),
    "yes_no/overall": ("yes/no\npairs", False),
    "binary/accuracy": ("yes/no", False),
    "choice/letter": ("choices", False),
    "letters/accuracy": ("letters", False),
    "rated/hallucination": ("rated\nfalse", False),
    "visibility/tau": ("visibility\ntau", False),
}
NOTE = f"▲ above, ▼ below the base: the interval of the paired difference excludes 0 (no marks below n = {FEWEST})"
Folders = Mapping[str, Path]  # of the trainings, by name


def heading(measure: str) -> str:
    return _head(measure).replace("\n", " ")


def _head(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.replace("/", "\n", 1)


def measured(results: dict[str, Any]) -> list[str]:
    """Return those of `MEASURES` that the held-out rows gave, and sets of questions of every kind."""
    given = results["contestants"][BASE]["measures"]
    return [name for name in (*MEASURES, *(name for name in given if name.startswith("sets/"))) if name in given]


def lines(results: dict[str, Any], folders: Folders, names: list[str]) -> list[list[str]]:
    """Return a line for each model: its name, its measures with intervals and marks, the seconds of its training."""
    made = []
    for model, own in results["contestants"].items():
        cells = [model]
        for name in names:
            compares = name in MEASURES and MEASURES[name][1]
            arrow = "" if compares else mark(own["differences"].get(name)).strip()
            cells.append("-" if compares and model == BASE else cell(own["measures"][name]) + arrow)
        made.append([*cells, "-" if model == BASE else f"{seconds(folders[model]):.0f}"])
    return made


def seconds(folder: Path) -> float:
    """Return how long a training took, of an interrupted one its last part."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]["train"]["train_runtime"]


def title(results: dict[str, Any]) -> str:
    data, level = results["data"], results["settings"]["level"]
    return f"{data['rows']} held-out rows in {data['clusters']} clusters, {level:.0%} intervals; logp and KL in nats"


def print_table(results: dict[str, Any], folders: Folders) -> None:
    """Print the table, its columns in several parts where the terminal is narrow."""
    console = make_console()
    console.width = max(console.width, WIDTH)
    for part in fitting(measured(results), partial(_table, results, folders), console.width):
        console.print(part)
    console.print(NOTE, style="italic")


def _table(results: dict[str, Any], folders: Folders, names: list[str]) -> Table:
    result = table("model", *map(_head, names), "seconds", title=title(results))
    for model, *cells in lines(results, folders, names):
        result.add_row(model, *(text.replace(" ", "\n", 1) for text in cells))  # the interval below its value
    return result


def write_table(results: dict[str, Any], folders: Folders, path: Path) -> Path:
    """Write the table as Markdown, whole or not at all."""
    names = measured(results)
    rows = [["model", *map(heading, names), "seconds"]]
    rows += [["---"] * len(rows[0]), *lines(results, folders, names)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    with atomic_write(path) as part:
        part.write_text(f"{title(results)}\n\n{text}\n{NOTE}\n", encoding="utf-8")
    return path
