"""The files that `trl-vpo import` reads: one, those of a folder, or all that an index names."""

import json
from pathlib import Path
from typing import Any

from trl_vpo.data.import_formats import FORMATS
from trl_vpo.data.json_files import parse_json
from trl_vpo.errors import ImportFormatError


def import_files(fmt: str, path: Path, media_root) -> list[tuple[Path, Any]]:
    """Return the files to read, each with its media root. Raises ImportFormatError.

    It is the file itself, all files of a folder that the format takes, or all that a meta.json of MMPR names.
    """
    if fmt not in FORMATS:
        raise ImportFormatError(f"unknown format {fmt!r}. Formats: {', '.join(FORMATS)}.")
    pattern = FORMATS[fmt].folder
    if path.is_dir() and pattern:
        if files := sorted(path.glob(pattern)):
            return [(file, media_root) for file in files]
        raise ImportFormatError(f"{path}: no {pattern} lies in this folder. Name the folder that has them, or a file.")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ImportFormatError(f"{path}: {what}. Name a .json, .jsonl or .parquet file.")
    parts = _meta(path) if fmt == "mmpr" and path.name.endswith("meta.json") else None
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
        files.append((base / part["annotation"], base / part["root"]))
    return files


def _meta(path: Path) -> dict[str, dict] | None:
    """Return the annotation files that a meta.json lists, by name; None for a file of records."""
    try:
        parts = parse_json(path.read_bytes())
    except json.JSONDecodeError:  # JSON lines
        return None
    except ValueError as error:
        raise ImportFormatError(f"{path}: {error}") from error
    entries = parts.values() if isinstance(parts, dict) else [None]
    listed = all(isinstance(entry, dict) and {"root", "annotation"} <= entry.keys() for entry in entries)
    return parts if listed else None
