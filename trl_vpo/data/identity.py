"""Whether files, media sources and processors are still the same; and the folder of what is kept between runs."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media.images import describe, frame_folder, load_image, resolve_path

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


def source_identity(source: Any, root: str | None, state: Callable[[Path], list] = file_identity) -> Any:
    """What stands for a media source in a key: of files the path and their `state`. It takes what can be loaded.

    Raises:
        MediaError: it is not there, or nothing that can be recognised.
    """
    if isinstance(source, dict):
        given = {k: v for k, v in source.items() if v is not None}
        holder = next((k for k in ("bytes", "path", "video", "image") if k in given), None)
        options = {k: v for k, v in given.items() if k not in ("bytes", "path", "video", "image")}
        return [options, source_identity(given.get(holder), root, state)]
    if isinstance(source, (str, Path)):
        files = frame_folder(source, root) or [resolve_path(source, root)]
        return [[str(file), *state(file)] for file in files]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, Image.Image):
        source = np.asarray(load_image(source, limit=False))
    if isinstance(source, np.ndarray):
        return [str(source.dtype), source.shape, hashlib.sha256(np.ascontiguousarray(source)).hexdigest()]
    if isinstance(source, (list, tuple)):
        return [source_identity(item, root, state) for item in source]
    raise MediaError(f"{describe(source)} cannot be recognised in a later run: precompute with paths or bytes.")


def processor_identity(processing_class: Any) -> list:
    """What a processor or tokenizer would be saved as: the names of its files, and what stands for their contents."""
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        found = {name: path.read_bytes() for name, path in files.items()}  # vocabularies may be no text
    if "tokenizer.json" in found:  # the last call's padding and truncation stay behind in it
        saved = {**json.loads(found["tokenizer.json"]), "padding": None, "truncation": None}
        found["tokenizer.json"] = json.dumps(saved).encode()
    return [[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(found.items())]


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide a run's result."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "av")
    return {"trl_vpo": package_version(), **{name: version(name) for name in names}}


def package_version() -> str:
    """Return the version of this package."""
    try:
        return version("trl-vpo")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
