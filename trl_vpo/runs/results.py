"""What a run leaves behind: rows to train on, the rejected inputs with their reasons, and a summary.

Every file is written beside its place and then put there whole, `summary.json` last. Written again, they are the same
byte for byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from trl_vpo.errors import GenerateError
from trl_vpo.files import atomic_write
from trl_vpo.generate.pipeline import Pipeline
from trl_vpo.runs.outcome import Outcome

RESULTS = ("rows.jsonl", "rejected.jsonl", "summary.json")


def write_results(folder: Path, outcomes: Sequence[Outcome], pipeline: Pipeline) -> dict[str, Any]:
    """Write `rows.jsonl`, `rejected.jsonl` and `summary.json`; gives the summary.

    Rows and rejected inputs stand in the order of the inputs, but for the rows that are the first to show a shape
    (see `_survey`): they stand in front.

    Raises:
        GenerateError: a figure that JSON cannot hold, or a file that cannot be written.
    """
    selected = pipeline.select(outcomes)
    if selected is not outcomes and [o.id for o in selected] != [o.id for o in outcomes]:
        raise ValueError(f"{type(pipeline).__name__}.select must give one outcome for each, in order")
    outcomes = selected
    columns, front = _survey(outcomes)
    replace_file(folder / "rows.jsonl", _row_lines(outcomes, columns, front))
    rejected = (outcome for outcome in outcomes if outcome.reason)
    lines = (encode({"id": o.id, "kind": o.kind, "reason": o.reason}, f"input {o.id!r}") for o in rejected)
    replace_file(folder / "rejected.jsonl", lines)
    kinds = Counter(outcome.kind or "other" for outcome in outcomes if outcome.reason)
    summary = {
        "inputs": len(outcomes),
        "kept": len(outcomes) - kinds.total(),
        "rows": sum(len(outcome.rows) for outcome in outcomes),
        "rejected": kinds.total(),
        "rejected_by_kind": dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        "figures": pipeline.summarize(outcomes),
    }
    text = encode(summary, "summary", indent=2)
    replace_file(folder / "summary.json", [text])
    return json.loads(text)


def _survey(outcomes: Sequence[Outcome]) -> tuple[list[str], list[tuple[int, int]]]:
    """The columns of all rows, and which rows go to the front: (number of the outcome, number of its row).

    `load_dataset("json")` takes the columns' types from the first 10 MB. A column, a key or a kind of number that
    shows up only later is cast to them, or is an error.
    """
    columns: dict[str, None] = {}
    shapes: set[tuple] = set()
    front = []
    for i, outcome in enumerate(outcomes):
        for j, row in enumerate(outcome.rows):
            columns.update(dict.fromkeys(row))
            known = len(shapes)
            shapes.update(_shapes(row, ""))
            if len(shapes) > known:
                front.append((i, j))
    return list(columns), front


def _shapes(value: Any, path: str) -> Iterator[tuple]:
    """(path, type) of every value and (path, keys) of every dictionary in a row. None and [] say nothing of a type."""
    if isinstance(value, dict):
        yield path, *sorted(value)
        for key, item in value.items():
            yield from _shapes(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _shapes(item, f"{path}[]")
    elif value is not None:
        yield path, type(value)


def _row_lines(outcomes: Sequence[Outcome], columns: list[str], front: list[tuple[int, int]]) -> Iterator[str]:
    """The training rows, all with the same columns."""
    in_front = set(front)

    def places() -> Iterator[tuple[Outcome, int]]:
        for i, j in front:
            yield outcomes[i], j
        for i, outcome in enumerate(outcomes):
            for j in range(len(outcome.rows)):
                if (i, j) not in in_front:
                    yield outcome, j

    for outcome, j in places():
        yield encode({column: outcome.rows[j].get(column) for column in columns}, f"input {outcome.id!r}")


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a file's lines whole or not at all. Only one process at a time may write the same file.

    Raises:
        GenerateError: it cannot be written.
    """
    try:
        with atomic_write(path, token="new") as part, part.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise GenerateError(
            f"{path} cannot be written ({error.strerror or error}). Free space there, then start the same command "
            "again: nothing that was made is lost."
        ) from error


def encode(value: Any, name: str, indent: int | None = None) -> str:
    """JSON that every reader takes.

    Raises:
        GenerateError: a number that is not finite, half a surrogate pair, or a value of another type; names its key.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
        text.encode()
    except (ValueError, TypeError) as error:
        found = next(_unfit(value, ""), str(error))
        raise GenerateError(f"{name}: {found}. JSON cannot hold it: leave the value out or make it None.") from error
    return text


def _unfit(value: Any, path: str) -> Iterator[str]:
    """What JSON cannot hold, with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unfit(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _unfit(item, f"{path}[{index}]")
    elif isinstance(value, float):
        if not isfinite(value):
            yield f"{path} is {value}"
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            yield f"{path} has half a surrogate pair ({value[:80]!r})"
    elif not isinstance(value, (int, type(None))):
        yield f"{path} is a {type(value).__name__}"
