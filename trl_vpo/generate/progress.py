"""The progress of a run: rate, kept and rejected inputs, time left."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between lines where the output is no terminal


class Bar:
    """A bar on a terminal, a line now and then in a log.

    Args:
        todo: inputs that this worker will work on.
        done: inputs that were finished before, or are another worker's.
        show: print at all.
    """

    def __init__(self, todo: int, *, done: int, show: bool):
        self.console = Console(stderr=True)
        self.todo, self.done, self.show = todo, done, show
        self.kept = self.rejected = 0
        columns = (
            BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            TextColumn("[green]kept {task.fields[kept]}[/green] [yellow]rejected {task.fields[rejected]}[/yellow]"),
        )  # fmt: skip
        self.live = show and self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, disable=not self.live)

    def __enter__(self) -> Bar:
        self.began = self.told = time.monotonic()
        if self.show and self.done:
            self.console.print(f"{self.done} inputs are finished or another worker's, {self.todo} to do.")
        self.progress.start()
        self.task = self.progress.add_task("", total=self.todo, rate="", kept=0, rejected=0)
        return self

    def advance(self, *, kept: bool) -> None:
        """One input is finished and written."""
        self.kept += kept
        self.rejected += not kept
        self.progress.update(self.task, advance=1, rate=self.rate(), kept=self.kept, rejected=self.rejected)
        if self.show and not self.live and time.monotonic() - self.told > EVERY:
            self._tell()

    def rate(self) -> str:
        per_second = (self.kept + self.rejected) / max(time.monotonic() - self.began, 1e-9)
        return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second * 60:.1f}/min"

    def _tell(self) -> None:
        self.told = time.monotonic()
        finished = self.kept + self.rejected
        left = (self.told - self.began) / max(finished, 1) * (self.todo - finished)
        print(
            f"{finished}/{self.todo} inputs, {self.rate()}, kept {self.kept}, rejected {self.rejected}, "
            f"about {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(self, *error) -> None:
        self.progress.stop()
        if self.show and not self.live and self.todo:
            self._tell()
