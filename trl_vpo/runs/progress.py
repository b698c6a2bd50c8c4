"""The progress of a run: rate, kept and rejected inputs, time left."""

from __future__ import annotations

import shutil
import sys
import time

from trl_vpo.runs.console import WIDTH, fit

EVERY = 30.0  # seconds between lines if the output is not a terminal


class Bar:
    """A line that is kept up to date on a terminal, and printed now and then in a log.

    Args:
        todo: inputs that this worker will work on.
        finished: inputs of its share that were finished before.
        workers: number of workers that share the inputs.
        show: print anything.
    """

    def __init__(self, todo: int, *, finished: int = 0, workers: int = 1, show: bool = True):
        self.todo, self.finished, self.workers, self.show = todo, finished, workers, show
        self.kept = self.rejected = 0
        self.live = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        self.started = self.printed = time.monotonic()
        if self.show:
            share = f"1 of {self.workers} shares, which is " if self.workers > 1 else ""
            state = f"{self.finished} finished, {self.todo} to do" if self.todo else "all finished before"
            self._print(f"{share}{self.finished + self.todo} inputs: {state}.\n")
        return self

    def advance(self, *, kept: bool) -> None:
        """Count one input that is finished and written."""
        self.kept += kept
        self.rejected += not kept
        if self.show and (self.live or time.monotonic() - self.printed >= EVERY):
            self._print_state(end="" if self.live else "\n")

    def __exit__(self, *error) -> None:
        if self.show and self.todo:
            self._print_state(end="\n")

    def _print_state(self, end: str) -> None:
        self.printed = time.monotonic()
        done, passed = self.kept + self.rejected, self.printed - self.started
        rate = done / max(passed, 1e-9)
        remaining = f"about {duration(passed / done * (self.todo - done))} left" if done else "none finished yet"
        parts = {
            "done": f"{done}/{self.todo} inputs",
            "rate": f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min",
            "kept": f"kept {self.kept}",
            "rejected": f"rejected {self.rejected}",
            "time": remaining if done < self.todo else f"{duration(passed)} in all",
        }
        width = shutil.get_terminal_size().columns - 1 if self.live else WIDTH
        line = fit(parts, ("rate", "kept", "rejected", "time"), width, ", ")
        self._print(f"\r{line:<{width}}{end}" if self.live else f"{line}{end}")

    def _print(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a readable duration: 40 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
