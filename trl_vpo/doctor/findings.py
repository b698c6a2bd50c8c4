"""What `trl-vpo doctor` found, and how it is printed."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from trl_vpo.data.check import Problem

SHOWN = 10
OK, WARN, STOP = "ok", "warning", "stop"
STYLES = {OK: "green", WARN: "yellow", STOP: "bold red"}


@dataclass
class Report:
    """What was found: one line per check, and every problem of a row."""

    findings: list[tuple[str, str, str]] = field(default_factory=list)  # (check, status, what)
    problems: list[dict] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, check: str, status: str, what: str) -> None:
        self.findings.append((check, status, what))

    def add_problems(self, dataset: str, problems: Iterable[Problem]) -> None:
        self.problems += [
            {"dataset": dataset, "row": p.index, "media": p.media, "reason": p.message} for p in problems
        ]

    @property
    def stops(self) -> bool:
        return any(status == STOP for _, status, _ in self.findings)


def show(report: Report, console: Console) -> None:
    """Print the tables and the first problems."""
    table = Table(title="Checks", title_justify="left")
    for heading in ("check", "status", "found"):
        table.add_column(heading, overflow="fold")
    for check, status, what in report.findings:
        table.add_row(check, f"[{STYLES[status]}]{status}[/]", _plain(what))
    console.print(table)
    if report.tokens:
        table = Table("tokens per row", "min", "median", "max", title_justify="left")
        for name, values in report.tokens.items():
            table.add_row(name, str(min(values)), f"{statistics.median(values):g}", str(max(values)))
        console.print(table)
    for problem in report.problems[:SHOWN]:
        console.print(f"- {problem['dataset']}: {problem['reason']}", markup=False, highlight=False)
    if len(report.problems) > SHOWN:
        console.print(f"... and {len(report.problems) - SHOWN} more; --out FILE writes them all.")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
