"""Sources of the page: the rows of a dataset as they are stored, and the other files of a generation run.

JSON files are read line by line: the page exists to show lines at which a reader of the whole file would stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from trl_vpo.data.json_files import parse_record, raw_records
from trl_vpo.data.raw_rows import RawRows
from trl_vpo.data.sources import local_splits, named_splits, row_format
from trl_vpo.errors import DatasetError
from trl_vpo.report.view.values import as_json, plain

ROWS, REJECTED, SUMMARY = "rows.jsonl", "rejected.jsonl", "summary.json"  # of a generation run's folder


@dataclass(frozen=True)
class Unreadable:
    """In the place of a row: the error, and the beginning of the text that caused it."""

    reason: str
    text: str


def read_examples(dataset: str | Path, split: str) -> Iterator[dict | Unreadable]:
    """Return the rows of a split in their order. Media stay paths and bytes.

    The dataset is a generation run's folder, or a Hub dataset or local path as in `trl_vpo.data.sources`. Raises
    DatasetError if the path, its rows or the split do not exist.
    """
    path = Path(dataset)
    if (path / ROWS).is_file() and split == "train":
        return read_json(path / ROWS)
    if row_format(path) or path.exists():
        files = local_splits(path).get(split)
        if isinstance(files, list) and row_format(files[0]) == "json":
            return chain.from_iterable(map(read_json, files))
    found = named_splits(str(dataset), [split])[split]
    rows = RawRows(found)
    return (row for i in range(len(found)) for row in rows.read(i, i + 1))  # each may hold whole videos


def read_rejected(dataset: str | Path) -> Iterator[dict]:
    """Yield what a run or an import left out: `id`, `kind`, `reason` (texts) and `more`, the rest as JSON text."""
    imported = Path(f"{dataset}.{REJECTED}")  # as `trl-vpo import` calls it
    path = imported if imported.is_file() else _beside(dataset, REJECTED)
    for record in read_json(path) if path.is_file() else ():
        if isinstance(record, Unreadable):
            record = {"kind": "unreadable line", "reason": record.reason, "more": record.text}
        else:
            more = {key: value for key, value in record.items() if key not in ("id", "kind", "reason")}
            record |= {"more": as_json(more) if more else ""}
        texts = {key: record.get(key) for key in ("id", "kind", "reason", "more")}
        yield {key: "" if text is None else str(text) for key, text in texts.items()}


def read_summary(dataset: str | Path) -> list[tuple[str, Any]]:
    """Return the figures of a run's summary as (path of keys, value); `error` is the only one if it is not JSON."""
    path = _beside(dataset, SUMMARY)
    if not path.is_file():
        return []
    try:
        return list(_leaves(json.loads(path.read_bytes())))
    except (ValueError, RecursionError) as error:
        return [("error", f"{path} is not JSON ({error}).")]


def _beside(dataset: str | Path, name: str) -> Path:
    """Return a file of the run that the dataset belongs to: in its folder, or beside its file."""
    path = Path(dataset)
    return (path.parent if path.is_file() else path) / name


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path of keys, scalar) for each leaf of nested dictionaries; lists are leaves, as JSON text."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path} / {key}" if path else str(key))
    else:
        yield path, plain(value) if isinstance(value, (str, bool, int, float)) else as_json(value)


def read_json(path: Path) -> Iterator[dict | Unreadable]:
    """Yield the objects of a file of JSON lines, or of a JSON list."""
    try:
        for kind, number, raw in raw_records(path):
            try:
                yield parse_record(raw)
            except ValueError as error:
                text = raw[:2000].decode("utf-8", "replace").strip() if isinstance(raw, bytes) else as_json(raw)
                yield Unreadable(f"{path.name}, {kind} {number}: {error}", text)
    except DatasetError as error:  # of the file as a whole
        yield Unreadable(str(error), "")
