"""Files that are written whole or not at all; and files that may be compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = (OSError, EOFError, lzma.LZMAError)  # what `open_packed` and reading from it raise


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


def open_packed(path: Path) -> BinaryIO:
    """A file to read, unpacked as the end of its name says (`COMPRESSED`)."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")
