"""Whether it is still the same: hashes of what a model is loaded from, and of rows with their media."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from trl_vpo.data.rows import COLUMNS
from trl_vpo.errors import MediaError
from trl_vpo.files import whole
from trl_vpo.media.images import frame_folder, resolve_path

# What a model is loaded from: weights, configs, tokenizer, chat templates, code of its own.
LOADED = (
    "*.json", "*.safetensors", "*.gguf", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "vocab.txt",
    "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
# What a training leaves in the folder of its result.
NOT_LOADED = {"run.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}
REMEMBERED = 1 << 26  # bytes; larger files are hashed once
SETTLED = 5.0  # seconds; a file that changed within them may change again without a new time
THREADS = 8  # opening files waits for disks; hashing leaves the interpreter to others
ENDS = 1 << 14  # bytes of a media file that are read at its beginning and at its end


# --- files of a model ---------------------------------------------------------------------------------------------


def model_files(name: str | Path, revision: str | None = None) -> dict[str, str]:
    """The hash of every file that a model is loaded from, by its name in the model's folder.

    Every byte counts: a merged adapter changes some tensors and leaves all others. Files of an adapter's base stand
    under `base/`. Nothing is known of a model that is neither a folder nor in the Hub's cache: {}.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except (OSError, ValueError):  # of the Hub's client: not there, or no name of a repo
            return {}
    paths = _loaded(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip([p.relative_to(folder).as_posix() for p in paths], pool.map(file_digest, paths)))
    if "adapter_config.json" in found and "config.json" not in found:
        base = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
        found |= {f"base/{name}": digest for name, digest in (model_files(base) if base else {}).items()}
    return found


def weights_digest(folder: str | Path) -> str:
    """One hash of what a folder's model is loaded from, so that one changed under its old name is noticed."""
    return files_digest(folder, _loaded(Path(folder)))


def files_digest(folder: str | Path, paths: Iterable[Path]) -> str:
    """One hash of files in a folder: their names there and their contents."""
    paths = sorted(paths)
    total = hashlib.blake2b(digest_size=8)
    with ThreadPoolExecutor(THREADS) as pool:
        for path, digest in zip(paths, pool.map(file_digest, paths)):
            total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's contents.

    That of a large file is remembered in the cache of the Hub's client under path, size and both times of its last
    change. A large file of the Hub's own cache is named by it.
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
        with suppress(OSError), whole(memory) as part:
            part.write_text(digest)
    return digest


def _memory() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "trl_vpo" / "digests"


def _loaded(folder: Path) -> list[Path]:
    found = {path for pattern in LOADED for path in folder.glob(pattern) if path.name not in NOT_LOADED}
    return sorted(filter(Path.is_file, found))


# --- rows ---------------------------------------------------------------------------------------------------------


def row_digests(dataset: Dataset, media_root: str | None = None) -> np.ndarray:
    """(rows,) uint64: a hash of each row's texts, phrases, boxes, id and media.

    A media file, and each of a folder of frames, is known by its size, its beginning and its end, wherever it lies:
    that is what a file that was encoded or cut again differs in, and 100,000 clips are read in seconds.
    """
    columns = [name for name in COLUMNS if name in dataset.column_names]
    digest = partial(_row_digest, media_root=media_root)
    found = []
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in dataset.select_columns(columns).with_format("arrow").iter(256):
            found += pool.map(digest, batch.to_pylist())
    return np.array(found, np.uint64)


MEDIA = {"videos", "video", "images", "image", "image_list"}


def _row_digest(row: dict, media_root: str | None) -> int:
    parts = {
        name: _media(value, media_root) if name in MEDIA else value for name, value in row.items() if value is not None
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _media(source: Any, root: str | None) -> Any:
    """What a medium is known by; takes what rows hold as Arrow gives it."""
    if isinstance(source, bytes):
        ends = source[:ENDS] + source[-ENDS:]
        return [len(source), hashlib.blake2b(ends, digest_size=16).hexdigest()]
    if isinstance(source, dict):
        given = {key: value for key, value in source.items() if value is not None}
        if given.get("bytes") is not None:
            given.pop("path", None)  # only its name
        return {key: _media(value, root) for key, value in sorted(given.items())}
    if isinstance(source, list):
        return [_media(item, root) for item in source]
    return _file(source, root) if isinstance(source, str) else source


def _file(source: str, root: str | None) -> Any:
    try:
        frames = frame_folder(source, root)
        if frames:
            return [[frame.name, *_ends(frame)] for frame in frames]
        return _ends(resolve_path(source, root))
    except (MediaError, OSError):
        return "missing"


def _ends(path: Path) -> list:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(file.read(ENDS), digest_size=16)
        file.seek(max(size - ENDS, 0))
        digest.update(file.read(ENDS))
    return [size, digest.hexdigest()]
