"""Identities of files, media sources and processors: is it still the same? And the folder of what runs keep."""

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.files import bytes_digest, ends_digest
from trl_vpo.media.images import describe, frame_folder, load_image, resolve_path

PAYLOAD = ("bytes", "path", "video", "image")  # keys of a dict that hold the medium, the first given one wins


def file_identity(path: Path) -> list:
    """Return both times, size and a digest of both ends of a file: one that is replaced with its old time differs."""
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_ctime_ns, *ends_digest(path)]


def cache_folder() -> Path:
    """Return a folder in the cache of `datasets`, which the environment variable `HF_DATASETS_CACHE` may move."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_vpo"


def source_identity(source: Any, root: str | None, state: Callable[[Path], list] = file_identity) -> Any:
    """Return what stands for a media source in a key: of files the path and their `state`.

    Raises MediaError for one that is missing, or nothing that can be recognised.
    """
    if isinstance(source, dict):
        entries = {key: value for key, value in source.items() if value is not None}
        payload = next((entries[key] for key in PAYLOAD if key in entries), None)
        options = {key: value for key, value in entries.items() if key not in PAYLOAD}
        return [options, source_identity(payload, root, state)]
    if isinstance(source, (str, Path)):
        files = frame_folder(source, root) or [resolve_path(source, root)]
        return [[str(file), *state(file)] for file in files]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes_digest(source)
    if isinstance(source, Image.Image):
        source = np.asarray(load_image(source, limit=False))
    if isinstance(source, np.ndarray):
        return [str(source.dtype), source.shape, bytes_digest(np.ascontiguousarray(source))]
    if isinstance(source, (list, tuple)):
        return [source_identity(item, root, state) for item in source]
    raise MediaError(f"{describe(source)} cannot be recognised in a later run: precompute with paths or bytes.")


def processor_identity(processing_class: Any) -> list:
    """Return the names of the files that a processor or tokenizer would be saved as, each with a digest."""
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        saved = {str(path.relative_to(folder)): path.read_bytes() for path in files}  # vocabularies may be no text
    if "tokenizer.json" in saved:  # the last call's padding and truncation stay behind in it
        settings = {**json.loads(saved["tokenizer.json"]), "padding": None, "truncation": None}
        saved["tokenizer.json"] = json.dumps(settings).encode()
    return [[name, bytes_digest(data)] for name, data in sorted(saved.items())]


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide a run's result."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "av")
    return {"trl_vpo": package_version(), **{name: version(name) for name in names}}


def package_version() -> str:
    try:
        return version("trl-vpo")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
