"""Files of JSON rows, read line by line: an error names its line, and a column's type comes from all of its rows.

The reader of `datasets` takes types from the first 10 MB (https://github.com/huggingface/datasets/issues/7222), reads
texts that look like dates as times, and recognises a changed file by its time alone. Once it does none of that, it can
take the place of this one.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Json, List, Value

from trl_vpo.data.identity import cache_folder
from trl_vpo.errors import DatasetError
from trl_vpo.files import UNREADABLE, atomic_write, file_digest, json_digest, open_packed

FORMAT = 1  # of the tables in the cache; raise it with a change to what is written
ROWS_AT_ONCE = 1000
MIXED = "mixed"
BOM = b"\xef\xbb\xbf"


def load_json(files: list[Path]) -> Dataset:
    """Return the rows of files in their order: a table in the cache of `datasets` that is named after their contents.

    A column whose values have one type keeps it; any other keeps its values as they are, as `datasets.Json`.
    """
    try:  # whole contents: a file may be replaced with its old time
        digest = json_digest([FORMAT, [[path.suffix, file_digest(path)] for path in files]])
    except OSError as error:
        path, reason = error.filename or files[0], error.strerror or error
        raise DatasetError(f"{path} cannot be read ({reason}). Check its permissions.") from error
    path = cache_folder() / "rows" / f"{digest}.arrow"
    if not path.exists():
        kinds: dict[str, Any] = {}
        for where, row in _located(files):
            for name, value in row.items():
                try:
                    kinds[name] = _merge(kinds.get(name), _kind(value))
                except ValueError as error:
                    raise DatasetError(f"{where}: `{name}` {error}") from error
        features = Features({name: _feature(kind) for name, kind in kinds.items()})
        if not features:
            raise DatasetError(f"{', '.join(map(str, files))}: no rows.")
        try:
            with atomic_write(path) as part:
                _write(read_json(files), features, part)
        except OSError as error:
            raise DatasetError(
                f"the rows of {files[0]} cannot be written to {path} ({error}). Free space there, or let the "
                "environment variable HF_DATASETS_CACHE name another folder."
            ) from error
    return Dataset.from_file(str(path))


def stream_json(files: list[Path]) -> IterableDataset:
    """Stream the rows of files in their order; each file is a shard."""
    return IterableDataset.from_generator(read_json, gen_kwargs={"files": list(files)})


def read_json(files: Iterable[Path]) -> Iterator[dict]:
    """Give the rows of JSON lines or JSON lists, compressed or not; DatasetError names a line that is none."""
    return (row for _, row in _located(files))


def _located(files: Iterable[Path]) -> Iterator[tuple[str, dict]]:
    """Give each row behind its place, for messages."""
    for path in files:
        for kind, number, raw in raw_records(path):
            where = f"{path}, {kind} {number}"
            try:
                row = parse_record(raw)
            except ValueError as error:
                raise DatasetError(f"{where}: {error}") from error
            yield where, row


def raw_records(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Give ("line", number, bytes) of JSON lines or ("item", number, object) of a JSON list, numbered from 1."""
    try:
        with open_packed(path) as file:
            first = next((line for line in file if line.lstrip(BOM).strip()), b"").lstrip(BOM)
        with open_packed(path) as file:
            if not first.lstrip().startswith(b"["):
                for number, line in enumerate(file, 1):
                    if line.lstrip(BOM).strip():
                        yield "line", number, line
                return
    except UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read ({error}). Check it, or fetch or write it again.") from error
    for number, item in enumerate(load_packed(path), 1):
        yield "item", number, item


def load_packed(path: Path) -> Any:
    """Return the value of a JSON file, compressed or not. Raises DatasetError."""
    try:
        with open_packed(path) as file:
            return parse_json(file.read())
    except (*UNREADABLE, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as JSON; mend it, or fetch or write it again: {error}") from error


def parse_record(raw: Any) -> dict:
    """Return the object of a line or of an item; raise ValueError, which says what it is instead."""
    record = raw
    if isinstance(raw, bytes):
        try:
            record = parse_json(raw)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not JSON ({error}). Write one record per line, or all in one list.") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, not an object with fields.")
    return record


def parse_json(raw: bytes | str) -> Any:
    """Return the value of JSON. Raise ValueError, also for a key that an object has twice: a value would be lost."""
    return json.loads(raw if isinstance(raw, str) else _decode(raw), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            both = f"{found[key]!r:.60} and {value!r:.60}"
            raise ValueError(f"an object has the key {key!r} twice, for {both}. Leave one of them.")
        found[key] = value
    return found


def _decode(raw: bytes) -> str:
    if raw.startswith((b"PK\3\4", b"\x1f\x8b")):
        raise ValueError("it begins as an archive (zip or gzip). Unpack it, or end the name of a gzip file in .gz.")
    if (code := json.detect_encoding(raw)) and not code.startswith("utf-8"):
        name = code.replace("-l", "l").replace("-b", "b")
        raise ValueError(f"it is written in {name}, not in UTF-8. Save the file as UTF-8: `iconv -f {name} -t utf-8`.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")[-40:]
        raise ValueError(
            f"byte {raw[error.start]:#04x} behind {before!r} is not UTF-8. Save the file as UTF-8: `iconv -f latin1 "
            "-t utf-8`, where it is Latin-1."
        ) from error


def check_text(text: str) -> None:
    """Raise ValueError for half a surrogate pair, which JSON may hold and no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):x} behind {text[: error.start][-40:]!r}"
        raise ValueError(f"holds half a surrogate pair ({half}). Take it out.") from None


def _kind(value: Any) -> Any:
    """Return None for null, a name for a plain value, a list of one kind, a dict of kinds, or `MIXED`."""
    if isinstance(value, str):
        check_text(value)
        return "string"
    if isinstance(value, dict):
        kinds = {key: _kind(item) for key, item in value.items()}
        return kinds if kinds and MIXED not in kinds.values() else MIXED
    if isinstance(value, list):
        inner = None
        for item in value:
            inner = _merge(inner, _kind(item))
        return MIXED if inner == MIXED else [inner]
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise ValueError(f"holds {value}, a number of more than 64 bits. Write it as a text.")
    return {bool: "bool", int: "int64", float: "float64"}.get(type(value))


def _merge(a: Any, b: Any) -> Any:
    if a == b or b is None:
        return a
    if a is None:
        return b
    if isinstance(a, list) and isinstance(b, list):
        inner = _merge(a[0], b[0])
        return MIXED if inner == MIXED else [inner]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        merged = {key: _merge(kind, b[key]) for key, kind in a.items()}
        return MIXED if MIXED in merged.values() else merged
    return "float64" if {str(a), str(b)} == {"int64", "float64"} else MIXED


def _feature(kind: Any) -> Any:
    if isinstance(kind, dict):
        return {key: _feature(inner) for key, inner in kind.items()}
    if isinstance(kind, list):
        return List(_feature(kind[0]))
    return Json() if kind == MIXED else Value(kind or "null")


def _write(rows: Iterator[dict], features: Features, path: Path) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            columns = []
            for field in schema:
                values = [row.get(field.name) for row in chunk]
                if field.type == pa.json_():  # encoded here: `datasets` reads a text such as "42" as its value
                    values = [None if value is None else json.dumps(value) for value in values]
                columns.append(pa.array(values, field.type))
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
