"""The findings of `trl-vpo doctor`, and how they are printed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from trl_vpo.data.check import Problem
from trl_vpo.doctor.memory_report import MemoryReport, show_memory
from trl_vpo.runs.console import table

SHOWN = 10
PROBLEM = ("dataset", "row", "media", "reason")  # keys of a problem
OK, WARN, STOP = "ok", "warning", "stop"
STYLES = {OK: "green", WARN: "yellow", STOP: "bold red"}


@dataclass
class Report:
    """One finding per check, every problem of a row, token counts, and the memory where it could be estimated."""

    findings: list[tuple[str, str, str]] = field(default_factory=list)  # (check, status, text)
    problems: list[dict] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    memory: MemoryReport | None = None

    def add(self, check: str, status: str, text: str) -> None:
        self.findings.append((check, status, text))

    def add_problems(self, dataset: str, problems: Iterable[Problem]) -> None:
        self.problems += [dict(zip(PROBLEM, (dataset, p.index, p.media, p.message), strict=True)) for p in problems]

    @property
    def stops(self) -> bool:
        return any(status == STOP for _, status, _ in self.findings)


def show(report: Report, console: Console) -> None:
    """Print the tables and the first problems."""
    checks = table("check", "status", "result", title="Checks", texts=3)
    for check, status, text in report.findings:
        checks.add_row(check, Text(status, style=STYLES[status]), text)
    console.print(checks)
    if report.tokens:
        tokens = table("tokens per row", "min", "median", "max")
        for name, values in report.tokens.items():
            tokens.add_row(name, str(min(values)), f"{statistics.median(values):g}", str(max(values)))
        console.print(tokens)
    for problem in report.problems[:SHOWN]:
        console.print(f"- {problem['dataset']}: {problem['reason']}")
    if len(report.problems) > SHOWN:
        console.print(f"... and {len(report.problems) - SHOWN} more; --out FILE writes them all.")
    if report.memory is not None:
        show_memory(report.memory, console)
