"""Whether a file is still the same, without reading all of it; and the folder of what is kept between runs."""

import hashlib
import os
from pathlib import Path

import datasets

ENDS = 4096  # bytes at the head and at the tail that are looked at


def file_identity(path: Path) -> list:
    """The size, both times and a digest of head and tail of a file: one that is replaced with its old time differs.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        ends = file.read(ENDS)
        if found.st_size > ENDS:
            file.seek(max(ENDS, found.st_size - ENDS))
            ends += file.read(ENDS)
    digest = hashlib.blake2b(ends, digest_size=16).hexdigest()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, digest]


def cache_folder() -> Path:
    """A folder in the cache of `datasets`, which the environment variable `HF_DATASETS_CACHE` may move."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_vpo"
