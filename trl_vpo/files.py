"""Files that are written whole, are compressed or hold a JSON object, and digests that tell what has changed.

A digest is a hex string. What is digested for which purpose lies higher up: media and processors in
`trl_vpo.data.identity`, models and training rows in `trl_vpo.runs.digests`.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what `open_packed` and reading from it raise
REMEMBERED = 1 << 26  # bytes; the digests of larger files are remembered
SETTLED = 5.0  # seconds; a file that changed within them may change again without a new time
ENDS = 1 << 14  # bytes at the beginning and at the end of a file that `ends_digest` reads
THREADS = 8  # opening files waits for disks; hashing leaves the interpreter to others


@contextmanager
def atomic_write(path: Path, *, token: str | None = None) -> Iterator[Path]:
    """Yield a file to write beside `path`; it takes that place at the end of the block, or is removed after an error.

    A folder that is missing is made. `token` is part of the name meanwhile. None: a random one, so that several may
    write the same file at once; a fixed one leaves no second file behind when writers are killed again and again.
    Raises OSError.
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
    """Open a file to read, unpacked as the end of its name says (`COMPRESSED`)."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object that a file holds; under each of these keys is another one.

    Raises ValueError, which speaks of the file as "it".
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object.")
    if wrong := [key for key in keys if not isinstance(content.get(key), dict)]:
        raise ValueError(f"its {wrong[0]} is {content.get(wrong[0])!r}, and no JSON object.")
    return content


# --- digests --------------------------------------------------------------------------------------------------------


def bytes_digest(data: bytes, size: int = 16) -> str:
    """The digest of bytes in memory, of `size` bytes."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def json_digest(value: Any, size: int = 16, default: Callable[[Any], Any] = str) -> str:
    """The digest of a value written as JSON, with sorted keys; `default` writes what JSON does not know."""
    return bytes_digest(json.dumps(value, sort_keys=True, default=default).encode(), size)


def ends_digest(path: Path) -> list:
    """Return [size, digest of the beginning and the end] of a file.

    That is what a file differs in that was encoded, cut or replaced; 100,000 clips are read in seconds. Raises
    OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = file.read(ENDS)
        file.seek(max(size - ENDS, 0))
        return [size, bytes_digest(ends + file.read(ENDS))]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's contents.

    That of a large file is remembered in the cache of the Hub's client, under path, size and both times of its last
    change. A large file of the Hub's own cache is named by it. Raises OSError.
    """
    path = path.resolve()
    if path.parent.name == "blobs" and len(path.name) == 64:
        return path.name
    stat = path.stat()
    if stat.st_size < REMEMBERED:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    key = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    memory = _memory() / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError):
        if len(known := memory.read_text()) == 64:
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_ctime > SETTLED:
        with suppress(OSError), atomic_write(memory) as part:
            part.write_text(digest)
    return digest


def _memory() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "trl_vpo" / "digests"


def file_digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """The digests of files by their names from a folder, in the order of the names."""
    paths = sorted(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(file_digest, paths)
        return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, digests)}
