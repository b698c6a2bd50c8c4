"""Preference data files of other projects -> rows that follow the row contract (`trl-vpo import FORMAT IN OUT`).

A file is a JSON list or JSON lines, recognised by its first character and compressed or not, or a parquet file.
`import_formats` has the formats. Fields that it does not read are not carried over; the counts name them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from trl_vpo.data.import_formats import FORMATS, read_record
from trl_vpo.data.json_files import parse_record, raw_records
from trl_vpo.data.messages import drop_none
from trl_vpo.errors import DatasetError, ImportFormatError
from trl_vpo.files import atomic_write

LIST_COLUMNS = ("images", "videos", "chosen_phrases", "rejected_phrases")


@dataclass
class ImportCounts:
    """The result of `convert`. Media are counted once per path."""

    read: int = 0
    written: int = 0
    rejected: int = 0
    media: int = 0
    missing_media: int = 0  # local paths that do not exist (now, seen from here)
    ignored_fields: list[str] = field(default_factory=list)
    rejected_path: str | None = None


def import_rows(
    fmt: str, path, *, media_root=None, on_reject: Callable[[ImportFormatError], None] | None = None
) -> Iterator[dict]:
    """Give the rows of a file in the format `fmt`, one by one (JSON lines are streamed).

    Relative media paths are joined to `media_root`; URLs and absolute paths stay, and files need not exist.
    `on_reject` is called with the error of each bad record, which is then left out; without it the error is raised.
    Raises ImportFormatError, also for an unknown format or an unreadable file.
    """
    for _, row in _read(fmt, Path(path), media_root):
        if isinstance(row, dict):
            yield row
        elif on_reject is None:
            raise row
        else:
            on_reject(row)


def convert(fmt: str, in_path, out_path, *, media_root=None, on_bad: str = "error") -> ImportCounts:
    """Write a file's rows as JSON lines to `out_path`, whole or not at all; see `import_rows`.

    The file is read twice: columns that no row fills are left out, and the first row that fills a column moves to
    the front, since `load_dataset("json")` takes the columns' types from the first 10 MB. `on_bad`: "error" stops at
    the first bad record, "skip" counts bad records and lists them with their reasons in `<out_path>.rejected.jsonl`.
    Raises ImportFormatError, also where no record can be used.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}; it must be 'error' or 'skip'.")
    source, target = Path(in_path), Path(out_path)
    if source.exists() and target.exists() and source.samefile(target):
        raise ImportFormatError(f"{target}: input and output are the same file. Name another output.")
    rejects: list[dict] = []
    counts, first = _survey(fmt, source, media_root, rejects if on_bad == "skip" else None)
    rejected_path = target.with_name(target.name + ".rejected.jsonl")
    rejected_path.unlink(missing_ok=True)  # of an earlier run
    if rejects:
        counts.rejected, counts.rejected_path = len(rejects), str(rejected_path)
        _write_lines(rejected_path, rejects)
    if not counts.written:
        why = f"; {rejected_path} says why." if rejects else ". Is it the right file?"
        raise ImportFormatError(f"{source}: none of its {counts.read} records can be imported as {fmt}{why}")
    columns = {"id", "source", "prompt", "chosen", "rejected", *first}
    front = dict(sorted(first.values(), key=lambda item: item[0]))  # by number: one row may fill several columns
    rows = enumerate(import_rows(fmt, source, media_root=media_root, on_reject=lambda _: None))
    ordered = chain(front.values(), (row for number, row in rows if number not in front))
    _write_lines(target, ({key: value for key, value in row.items() if key in columns} for row in ordered))
    return counts


def _survey(fmt: str, source: Path, media_root, rejects: list | None) -> tuple[ImportCounts, dict]:
    """Return the counts, and for each list column the first (number, row) to fill it. Bad records go to `rejects`."""
    counts, first, ignored, media = ImportCounts(), {}, set(), set()
    for record, row in _read(fmt, source, media_root):
        counts.read += 1
        if isinstance(row, ImportFormatError):
            if rejects is None:
                raise row
            rejects.append({"reason": str(row), "record": record})
            continue
        ignored |= set(record) - FORMATS[fmt].fields
        media |= {*row.get("images", []), *row.get("videos", [])}
        for column in LIST_COLUMNS:
            if row.get(column):
                first.setdefault(column, (counts.written, row))
        counts.written += 1
    counts.ignored_fields, counts.media = sorted(ignored), len(media)
    counts.missing_media = sum(not _exists(path) for path in media)
    return counts, first


def _read(fmt: str, path: Path, media_root) -> Iterator[tuple[object, dict | ImportFormatError]]:
    """Give (record, row or error) for each record of a file."""
    if fmt not in FORMATS:
        raise ImportFormatError(f"unknown format {fmt!r}. Formats: {', '.join(FORMATS)}.")
    if not path.is_file():
        raise ImportFormatError(f"{path}: no such file. Name a .json, .jsonl or .parquet file.")
    for kind, number, raw in _records(path):
        record = raw
        try:
            record = parse_record(raw)
            row = read_record(fmt, record)
            row["id"] = row["id"] or f"{path.stem}-{number}"
            for column in {"images", "videos"} & row.keys():
                row[column] = [
                    path if media_root is None or "://" in path else os.path.join(media_root, path)
                    for path in row[column]
                ]
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is in JSON, but in no text
        except ValueError as error:
            record = raw.decode("utf-8", "replace").strip() if isinstance(record, bytes) else record
            row = ImportFormatError(f"{path}, {kind} {number}: {error}")
        yield record, row


def _records(path: Path) -> Iterator[tuple]:
    """Give (kind, number, record) of a file, as `raw_records` does; of parquet the rows, numbered from 0."""
    try:
        if path.suffix.lower() != ".parquet":
            yield from raw_records(path)
            return
        batches = pq.ParquetFile(path).iter_batches(batch_size=100)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from (("row", number, drop_none(row)) for number, row in enumerate(rows))
    except DatasetError as error:
        raise ImportFormatError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        raise ImportFormatError(f"{path} cannot be read as a parquet file ({error}). Fetch it again.") from error


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    # backslashreplace is JSON's own escape
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>") + "\n")


def _exists(path: str) -> bool:
    """Return True for a local file or folder of frames, and for URLs of other schemes, which are not looked up."""
    url = urlsplit(path) if "://" in path else None
    return os.path.exists(path) if url is None else url.scheme != "file" or os.path.exists(unquote(url.path))
