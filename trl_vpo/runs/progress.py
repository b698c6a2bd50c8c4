"""The progress of a run: rate, kept and rejected inputs, time left."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between lines where the output is no terminal


class Bar:
    """A bar on a terminal, a line now and then in a log, of what one worker does.

    Args:
        todo: inputs that this worker will work on.
        finished: inputs of its share that were finished before.
        workers: how many share the inputs.
        show: print at all.
    """

    def __init__(self, todo: int, *, finished: int = 0, workers: int = 1, show: bool = True):
        self.todo, self.finished, self.workers, self.show = todo, finished, workers, show
        self.kept = self.rejected = 0
        columns = (
            BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            TextColumn("[green]kept {task.fields[kept]}[/green] [yellow]rejected {task.fields[rejected]}[/yellow]"),
        )  # fmt: skip
        console = Console(stderr=True)
        self.live = show and console.is_terminal
        self.progress = Progress(*columns, console=console, disable=not self.live)

    def __enter__(self) -> Bar:
        self.started = self.printed = time.monotonic()
        if self.show:
            share = f"1 of {self.workers} shares, which is " if self.workers > 1 else ""
            print(
                f"{share}{self.finished + self.todo} inputs: {self.finished} finished, {self.todo} to do.",
                file=sys.stderr,
                flush=True,
            )
        if self.live:  # even a disabled bar of rich before 13.8 ends with an empty line
            self.progress.start()
        self.task = self.progress.add_task("", total=self.todo, rate="", kept=0, rejected=0)
        return self

    def advance(self, *, kept: bool) -> None:
        """Count one input that is finished and written."""
        self.kept += kept
        self.rejected += not kept
        self.progress.update(self.task, advance=1, rate=self._rate(), kept=self.kept, rejected=self.rejected)
        if self.show and not self.live and time.monotonic() - self.printed >= EVERY:
            self._print_line()

    def __exit__(self, *error) -> None:
        if self.live:
            self.progress.stop()
        elif self.show and self.todo:
            self._print_line()

    def _print_line(self) -> None:
        self.printed = time.monotonic()
        done, passed = self.kept + self.rejected, self.printed - self.started
        left = f"about {duration(passed / done * (self.todo - done))} left" if done else "none finished yet"
        end = left if done < self.todo else f"{duration(passed)} in all"
        line = f"{done}/{self.todo} inputs, {self._rate()}, kept {self.kept}, rejected {self.rejected}, {end}"
        print(line, file=sys.stderr, flush=True)

    def _rate(self) -> str:
        per_second = (self.kept + self.rejected) / max(time.monotonic() - self.started, 1e-9)
        return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second * 60:.1f}/min"


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
