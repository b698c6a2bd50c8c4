"""What the studies' results have in common: rows as JSON lines, intervals over seeds, and tables in Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KEYS = ("method", "pairs", "rate", "steps", "seed")  # of a cell; a study without one of them has no such column


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, of those of one cell the last; none if there is no file.

    A line that was cut off, by a kill or a full disk, or is no row, is said and left out: its run is made again.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line)
            rows[row["method"], *map(row.get, KEYS[1:])] = row
        except (ValueError, TypeError, KeyError, AttributeError):  # no JSON, no object, no method, a list as a key
            text = "cut off, or no row, so its run counts as missing. Delete the line."
            print(f"{path}, line {number}: {text}", file=sys.stderr)
    return list(rows.values())


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows in one write: several workers share a file. They never continue a line that was cut off.

    Raises:
        SystemExit: they cannot be written.
    """
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            if file.tell() and file.seek(-1, 2) and file.read(1) != b"\n":
                data = b"\n" + data
            while data:  # a full disk takes a part of it
                data = data[file.write(data) :]
    except OSError as error:
        why = error.strerror or error
        raise SystemExit(f"{path} cannot be written ({why}). Mend that; the same command then continues.") from error


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def over_seeds(values: np.ndarray, clusters: Sequence, draws: int = 2000) -> Estimate:
    """Return the mean of `values` (seeds, rows) with a 95 % interval.

    Seeds and clusters of rows are drawn with replacement, independently of each other (pigeonhole bootstrap). With two
    seeds such an interval is rough; it is no narrower than what the two differ by.
    """
    random, count = np.random.default_rng(0), len(values)
    numbers = np.unique(np.array(clusters, dtype=str), return_inverse=True)[1]
    groups = numbers.max() + 1
    seeds = random.multinomial(count, [1 / count] * count, size=draws)
    rows = random.multinomial(groups, [1 / groups] * groups, size=draws)[:, numbers]
    found = np.einsum("ds,sn,dn->d", seeds, values, rows) / (count * rows.sum(1))
    return Estimate(float(values.mean()), *map(float, np.quantile(found, [0.025, 0.975])))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])
