"""Data files of other projects -> rows that follow the row contract, or questions (`trl-vpo import FORMAT IN OUT`).

A file is a JSON list or JSON lines, recognised by its first character and compressed or not, or a parquet file.
`import_formats` has the formats. Fields that it does not read are not carried over; the counts name them. Embedded
pictures become files that are named after their contents, so that rows hold paths.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import chain, product
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trl_vpo.data.import_benchmarks import PLACE, SILENT
from trl_vpo.data.import_formats import FORMATS, MASKED_COPIES, read_record
from trl_vpo.data.inputs import portable
from trl_vpo.data.json_files import check_text, load_packed, parse_record
from trl_vpo.data.messages import OTHER, REJECTED
from trl_vpo.data.record_files import read_records
from trl_vpo.errors import DatasetError, ImportFormatError
from trl_vpo.files import COMPRESSED, atomic_write

MEDIA_COLUMNS = ("images", "videos", "image_list", *REJECTED, *OTHER)
LIST_COLUMNS = (*MEDIA_COLUMNS, "rejected", "chosen_phrases", "rejected_phrases", "options", "contents")
PARTS = "parts"  # of videos, in the survey


@dataclass
class ImportCounts:
    """The result of `convert`."""

    read: int = 0
    written: int = 0
    rejected: int = 0
    media: set[str] = field(default_factory=set)  # their paths
    missing_media: list[str] = field(default_factory=list)  # URLs, and paths that do not exist (now, seen from here)
    first: dict[str, tuple[int, dict]] = field(default_factory=dict)  # list column or PARTS -> first (number, row)
    filled: Counter = field(default_factory=Counter)  # list column -> how many rows fill it
    ignored_fields: list[str] = field(default_factory=list)
    rejected_path: str | None = None
    left_to_do: list[str] = field(default_factory=list)  # sentences for the user: what the rows still need

    def report(self, target: Path) -> str:
        """Return what was written to `target`, what was left out, and what is left to do, line by line."""
        lines = [f"{target}: {self.written} rows of {self.read} records."]
        lines.append(f"Media files: {len(self.media)}, {len(self.missing_media)} missing.")
        if self.rejected:
            lines.append(f"Left out: {self.rejected}; {self.rejected_path} says why.")
        if self.ignored_fields:
            lines.append(f"Fields not carried over: {', '.join(self.ignored_fields)}.")
        return "\n".join([*lines, *self.left_to_do])


def convert(fmt: str, in_path, out_path, *, media_root=None, on_bad: str = "error") -> ImportCounts:
    """Write a file's rows as JSON lines to `out_path`, whole or not at all.

    Relative media paths are joined to `media_root`; URLs and absolute paths stay, and files need not exist. Embedded
    pictures go into a folder beside `out_path`: `train.jsonl` has `train_media`.

    The file is read twice: columns that no row fills are left out, and the first row that fills a column moves to
    the front, since `load_dataset("json")` takes the columns' types from the first 10 MB. `on_bad`: "error" stops at
    the first bad record, "skip" counts bad records and lists them with their reasons in `<out_path>.rejected.jsonl`.
    Raises ImportFormatError, also where no record can be used.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}; it must be 'error' or 'skip'.")
    source, target = Path(in_path), Path(out_path)
    if target.suffix.lower() not in (".jsonl", ".ndjson"):  # .json: so end the files of benchmarks
        raise ImportFormatError(f"{target}: the output is JSON lines. Name a file that ends in .jsonl.")
    files = import_files(fmt, source, media_root)
    rejected_path = target.with_name(target.name + ".rejected.jsonl")
    for out, path in product((target, rejected_path), (source, *(file for file, _ in files))):
        if out.exists() and out.samefile(path):
            raise ImportFormatError(f"{out}: input and output are the same file. Name another output.")
    folder = target.absolute().with_name(f"{target.stem}_media")
    rejects: list[dict] = []
    counts = _survey(fmt, read_rows(fmt, files, folder), rejects if on_bad == "skip" else None)
    if rejected_path.exists():  # of an earlier run
        rejected_path.unlink()
    if rejects:
        counts.rejected, counts.rejected_path = len(rejects), str(rejected_path)
        _write_lines(rejected_path, rejects)
    if not counts.written:
        why = f"; {rejected_path} says why." if rejects else ". Is it the right file?"
        raise ImportFormatError(f"{source}: none of its {counts.read} records can be imported as {fmt}{why}")
    missing = counts.filled["rejected"] < counts.written  # else its type is known from any row
    named = [item for name, item in counts.first.items() if missing or name != "rejected"]
    front = dict(sorted(named, key=lambda item: item[0]))  # by number: one row may fill several columns
    good = (rows for _, rows in read_rows(fmt, files, folder) if isinstance(rows, list))
    rows = enumerate(chain.from_iterable(good))
    ordered = chain(front.values(), (row for number, row in rows if number not in front))
    empty = set(LIST_COLUMNS) - set(counts.first)
    if PARTS in counts.first:
        ordered = map(_with_parts, ordered)
    _write_lines(target, ({key: value for key, value in row.items() if key not in empty} for row in ordered))
    counts.left_to_do = _left_to_do(fmt, counts, target, media_root, folder)
    return counts


def _survey(fmt: str, records: Iterator[tuple], rejects: list | None) -> ImportCounts:
    """Read all records. Bad ones go to `rejects`; without it the first is raised."""
    counts, ignored = ImportCounts(), set()
    for record, rows in records:
        counts.read += 1
        if isinstance(rows, ImportFormatError):
            if rejects is None:
                raise rows
            rejects.append({"reason": str(rows), "record": record})
            continue
        ignored |= set(record) - FORMATS[fmt].fields
        for row in rows:
            counts.media |= {_path(item) for column in MEDIA_COLUMNS for item in row.get(column) or []}
            filled = [*filter(row.get, LIST_COLUMNS)]
            if any(isinstance(video, dict) for video in row.get("videos", [])):
                filled.append(PARTS)
            counts.filled.update(filled)
            counts.first |= {name: (counts.written, row) for name in filled if name not in counts.first}
            counts.filled["silent"] += row.get("question", "").startswith(SILENT)
            counts.filled["sets"] += bool(row.get("sets"))
            counts.filled["phrases"] += bool(row.get("chosen_phrases") or row.get("rejected_phrases"))
            counts.written += 1
    counts.missing_media = sorted(path for path in counts.media if not _exists(path))
    counts.ignored_fields = sorted(ignored)
    return counts


def _left_to_do(fmt: str, counts: ImportCounts, target: Path, media_root, folder: Path) -> list[str]:
    """Return sentences: what the import did beside its output, and what the rows need before they can be used."""
    notes, rows = [], counts.written
    if written := sum(Path(path).parent == folder for path in counts.media):
        notes.append(f"{written} embedded pictures are in {folder}.")
    if files := [path for path in counts.missing_media if not _remote(path)]:
        start = "start here" if media_root is None else f"were joined to {media_root}"
        remedy = "--media_root FOLDER names the folder that they start from."
        notes.append(f"Missing media, for example {files[0]}. Relative paths {start}: {remedy}")
    if urls := [*filter(_remote, counts.missing_media)]:
        notes.append(f"URLs, for example {urls[0]}: nothing is fetched here, download them and write their paths.")
    makes = f"`trl-vpo generate {'lpoi' if fmt == 'lpoi' else 'METHOD'} --dataset_name {target}`"
    if FORMATS[fmt].makes == "held-out rows":
        notes.append(f"These are held-out rows: `trl-vpo evaluate --data {target}` measures a model on them.")
    if counts.rejected and counts.filled["sets"]:
        notes.append("A set of questions that lost a record is right where the rest of it is: mend the records.")
    if silent := counts.filled["silent"]:
        notes.append(f"{silent} of {rows} prompts say that the video has no subtitles: no .srt file has its name.")
    if FORMATS[fmt].makes == "questions":
        notes.append(f"These are questions: {makes} makes pairs of them.")
    if fmt == "lpoi" and (boxless := rows - counts.filled["image_list"]):
        notes.append(f"{boxless} of {rows} rows have no image list: {makes} finds their critical boxes.")
    if fmt in ("rrpo", "videochat2") and (plain := rows - counts.filled["phrases"]):
        notes.append(f"{plain} of {rows} rows mark no phrases: RRPO will find them by a word diff.")
    return notes


# --- files ----------------------------------------------------------------------------------------------------------


def import_files(fmt: str, path: Path, media_root) -> list[tuple[Path, Any]]:
    """Return the files to read, each with its media root. Raises ImportFormatError.

    It is the file itself, all files of a folder that the format takes, or all that a meta.json of MMPR names, each as
    often as its `repeat_time` says.
    """
    if fmt not in FORMATS:
        raise ImportFormatError(f"unknown format {fmt!r}. Formats: {', '.join(FORMATS)}.")
    pattern = FORMATS[fmt].folder
    if path.is_dir() and pattern:
        files = sorted(file for file in path.glob("[!.]*") if fnmatch(_unpacked(file), pattern))
        if len(files) > len(set(map(_unpacked, files))):
            raise ImportFormatError(f"{path}: a file lies in this folder compressed and not, or twice. Leave one.")
        if files:
            return [(file, media_root) for file in files]
        raise ImportFormatError(f"{path}: no {pattern} lies in this folder. Name the folder that has them, or a file.")
    if not path.is_file():
        what = f"a folder, of which {fmt} reads one file" if path.is_dir() else "no such file"
        raise ImportFormatError(f"{path}: {what}. Name a .json, .jsonl or .parquet file.")
    parts = _meta(path) if fmt == "mmpr" and _unpacked(path).endswith("meta.json") else None
    if parts is None:
        return [(path, media_root)]
    # The paths begin with the dataset's own folder, in which meta.json lies.
    bases = [Path(media_root)] if media_root is not None else [Path(), path.parent, path.parent.parent]
    files = []
    for name, part in parts.items():
        base = next((base for base in bases if (base / part["annotation"]).is_file()), None)
        if base is None:
            raise ImportFormatError(
                f"{path}: `{name}` names {part['annotation']}, which is not in {' or '.join(map(str, bases))}. Unpack "
                "the annotations, and name the folder where these paths start as media_root."
            )
        times = part.get("repeat_time", 1)
        if not isinstance(times, (int, float)) or times < 1 or times % 1:
            raise ImportFormatError(
                f"{path}: `repeat_time` of `{name}` is {times!r}. Write how often its rows are taken, a whole number; "
                "for a part of them, write that part into a file of its own."
            )
        files += [(base / part["annotation"], base / part["root"])] * int(times)
    return files


def _unpacked(path: Path) -> str:
    """Return a file's name without the ending of a compressed one, in lower case."""
    return (path.stem if path.suffix.lower() in COMPRESSED else path.name).lower()


def _meta(path: Path) -> dict[str, dict] | None:
    """Return the annotation files that a meta.json lists, by name; None for a file of records."""
    try:
        parts = load_packed(path)
    except DatasetError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):  # JSON lines
            return None
        raise ImportFormatError(str(error)) from error
    entries = parts.values() if isinstance(parts, dict) else [None]
    listed = all(isinstance(entry, dict) and {"root", "annotation"} <= entry.keys() for entry in entries)
    return parts if listed else None


# --- reading --------------------------------------------------------------------------------------------------------


def read_rows(
    fmt: str, files: list[tuple[Path, Any]], folder: Path
) -> Iterator[tuple[object, list[dict] | ImportFormatError]]:
    """Give (record, rows or error) for each record of the files. Embedded media are written to `folder`."""
    seen: dict[str, int] = {}
    unique = FORMATS[fmt].makes != "pairs" or len(files) > len(set(files))  # a run tells its inputs apart by their ids
    for path, media_root in files:
        beside = FORMATS[fmt].beside(path)
        for place, (kind, number, raw) in enumerate(read_records(path, FORMATS[fmt].keyed)):
            record = raw
            where = f"{path}, {kind} {number}"
            try:
                record = parse_record(raw)
                rows = read_record(fmt, record | beside | ({PLACE: place} if beside else {}))
                check_text(json.dumps(rows, ensure_ascii=False, default=lambda data: ""))
            except ValueError as error:
                record = raw.decode("utf-8", "replace").strip() if isinstance(record, bytes) else record
                yield record, ImportFormatError(f"{where}: {error}")
                continue
            for n, row in enumerate(rows, 1):
                row["id"] = row["id"] or f"{path.stem}-{number}" + (f"-{n}" if len(rows) > 1 else "")
                if unique:
                    row["id"] = _unique(row["id"], seen)
                _place(row, media_root, folder)
            yield record, rows


def _unique(name: str, seen: dict[str, int]) -> str:
    """Return a name that was not seen before: the same one, or with a number behind it.

    `seen`: each name, with the last number that was put behind it.
    """
    new, number = name, seen.get(name, 1)
    while new in seen:
        number += 1
        new = f"{name}.{number}"
    seen[name] = number
    seen.setdefault(new, 1)
    return new


def _place(row: dict, media_root, folder: Path) -> None:
    """Write embedded media to files, join paths to `media_root`, and find LPOI's masked copies."""

    def placed(item):
        if isinstance(item, dict):
            return item | {"path": placed(item["path"])}
        if isinstance(item, str):
            return item if media_root is None or "://" in item else os.path.join(media_root, item)
        return portable(item, folder)

    for column in filter(row.get, MEDIA_COLUMNS):
        row[column] = [placed(item) for item in row[column]]
    copies = [placed(item) for item in row.pop(MASKED_COPIES, ())]
    if copies and all(os.path.exists(copy) for copy in copies):
        row["image_list"] = [*row["images"], *copies]


# --- writing --------------------------------------------------------------------------------------------------------


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    try:  # backslashreplace is JSON's own escape
        with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
                file.write(line + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise ImportFormatError(
            f"{path} cannot be written ({reason}). Free space there or name another output."
        ) from error


def _with_parts(row: dict) -> dict:
    """Return a row whose videos have the shape of a part: `load_dataset("json")` takes one shape for all rows."""
    if not row.get("videos"):
        return row
    whole = {"video_start": None, "video_end": None}
    return row | {"videos": [v if isinstance(v, dict) else {"path": v, **whole} for v in row["videos"]]}


def _path(source: str | dict) -> str:
    return source["path"] if isinstance(source, dict) else source


def _exists(path: str) -> bool:
    """Return True for a local file or folder of frames."""
    return not _remote(path) and os.path.exists(unquote(urlsplit(path).path) if "://" in path else path)


def _remote(path: str) -> bool:
    """Return True for a URL whose media would have to be fetched, which nothing here does."""
    return "://" in path and urlsplit(path).scheme != "file"
