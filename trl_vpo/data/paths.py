"""Paths that settings name, looked at before anything heavy is imported. Imports nothing heavy itself."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from trl_vpo.errors import DatasetError, RecipeError
from trl_vpo.files import COMPRESSED

ROWS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


def row_format(path: Path) -> str | None:
    """Return how a file holds rows, by its name: "json" (perhaps compressed), "parquet", or None."""
    *_, last = path.suffixes or [""]
    if last.lower() not in COMPRESSED:
        return ROWS.get(last.lower())
    inner = ROWS.get(Path(path.stem).suffix.lower())
    return "json" if inner == "json" else None


def check_exists(path: Path) -> None:
    """Raise DatasetError for rows that are not there."""
    if not path.exists():
        raise DatasetError(f"{path} does not exist (seen from {Path.cwd()}).")


def check_output_file(path: Path) -> None:
    """Raise RecipeError for a file that cannot be written. Its folder is made."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: name the file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise RecipeError(f"{path} cannot be written ({error.strerror or error}). Name another file.") from error


def check_output_dir(path: str) -> None:
    """Raise RecipeError for an `output_dir` that is a file, or lies below one."""
    for place in (Path(path), *Path(path).parents):
        if place.exists() and not place.is_dir():
            raise RecipeError(f"output_dir: {place} is a file. Name a folder; it is created if it does not exist.")
