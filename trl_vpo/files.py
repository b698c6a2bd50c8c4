"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, *, token: str | None = None) -> Iterator[Path]:
    """A file to write beside `path`: on leaving the block it takes that place, after an error it is removed.

    Args:
        path: the place; its folder is made if it is not there.
        token: part of the name meanwhile. None: one of its own, so that several may write the same file at once; a
            fixed one leaves no second file behind when writers are killed again and again.

    Raises:
        OSError: it cannot be written or put in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{token or secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
