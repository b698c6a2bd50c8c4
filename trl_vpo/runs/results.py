"""The results of a run: rows to train on, the rejected inputs with their reasons, and a summary.

Every file is replaced as a whole, `summary.json` last. Written again, the files are the same byte for byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from trl_vpo.errors import RunError
from trl_vpo.files import atomic_write
from trl_vpo.runs.outcome import Outcome

RESULTS = ("rows.jsonl", "rejected.jsonl", "summary.json")


class Report(Protocol):
    """The final step of a run: select the outcomes that stay, and compute the figures."""

    def select(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Return one outcome for each of these, in order; a row that is dropped becomes a rejected outcome."""

    def summarize(self, outcomes: Sequence[Outcome]) -> dict[str, Any]: ...


def write_results(folder: Path, outcomes: Sequence[Outcome], report: Report) -> dict[str, Any]:
    """Write `rows.jsonl`, `rejected.jsonl` and `summary.json`, and return the summary."""
    outcomes = report.select(outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    rejected = [outcome for outcome in outcomes if outcome.reason]
    kinds = Counter(outcome.kind or "other" for outcome in rejected)
    summary = {
        "inputs": len(outcomes),
        "kept": len(outcomes) - len(rejected),
        "rows": len(rows),
        "rejected": len(rejected),
        "rejected_by_kind": dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        "figures": report.summarize(outcomes),
    }
    columns = dict.fromkeys(column for row in rows for column in row)
    table = ({column: row.get(column) for column in columns} for row in _new_shapes_first(rows))
    reasons = ({"id": o.id, "kind": o.kind, "reason": o.reason} for o in rejected)
    write_lines(folder / "rows.jsonl", (encode(row, f"row {row['id']!r}") for row in table))
    write_lines(folder / "rejected.jsonl", (encode(reason, f"input {reason['id']!r}") for reason in reasons))
    text = encode(summary, "summary", indent=2)
    write_lines(folder / "summary.json", [text])
    return json.loads(text)


def _new_shapes_first(rows: Sequence[dict]) -> list[dict]:
    """Put the rows in front that are the first to show a key or a type, as `load_dataset("json")` needs them.

    It takes the columns' types from the first 10 MB. What appears only later is cast to them, or is an error.
    """
    known_shapes: set[tuple] = set()
    front, rest = [], []
    for row in rows:
        shapes = set(_shapes(row, ""))
        (rest if shapes <= known_shapes else front).append(row)
        known_shapes |= shapes
    return front + rest


def _shapes(value: Any, path: str) -> Iterator[tuple]:
    """Yield (path, type) of every value and (path, keys) of every dictionary. None and [] reveal no type."""
    if isinstance(value, dict):
        yield path, *sorted(value)
        for key, item in value.items():
            yield from _shapes(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _shapes(item, f"{path}[]")
    elif value is not None:
        yield path, type(value)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a file by these lines, whole or not at all; raise RunError if that fails. Not for several processes."""
    try:
        with atomic_write(path, token="new") as part, part.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}). Free space there, then start the same command "
            "again: nothing that was made is lost."
        ) from error


def encode(value: Any, name: str, indent: int | None = None) -> str:
    """Return a value as strict JSON; raise RunError if it holds a nan or an object without a JSON form."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
        text.encode()
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{name} holds a value that JSON cannot represent ({error}). Leave it out or make it None."
        ) from error
    return text
