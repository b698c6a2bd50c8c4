"""What commands print: texts as they are, tables of one style, and lines that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 80  # of lines in a log


def make_console(**options: Any) -> Console:
    """Return a console that shows texts as they are, also in tables: `[red]` is no style, `:car:` no picture.

    Everything that rich prints goes through one: names, paths and messages may hold anything.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


def table(*headings: str, title: str | None = None, caption: str | None = None, texts: int = 1) -> Table:
    """Return a table to add rows to: its first columns, `texts` of them, hold texts, the others numbers.

    Texts are folded where the terminal is narrow, numbers never.
    """
    result = Table(
        title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left",
        show_header=any(headings),
    )  # fmt: skip
    for place, heading in enumerate(headings):
        number = place >= texts
        result.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return result


def fitting(names: Sequence[str], make: Callable[[Sequence[str]], Table], width: int) -> list[Table]:
    """Return the table that `make` gives for names, or several for fewer names each where it is wider than `width`."""
    wide = make_console(width=10_000)
    for size in range(len(names), 0, -1):
        tables = [make(names[start : start + size]) for start in range(0, len(names), size)]
        if size == 1 or max(wide.measure(part).maximum for part in tables) <= width:
            return tables
    return []


def fit(parts: Mapping[str, str], drop: Iterable[str], width: int = WIDTH, between: str = "  ") -> str:
    """Join texts to a line of at most this width; until it fits, leave out what `drop` names, in its order."""
    left, names = dict(parts), iter(drop)
    while len(line := between.join(left.values())) > width and (name := next(names, None)) is not None:
        left.pop(name, None)
    return line
