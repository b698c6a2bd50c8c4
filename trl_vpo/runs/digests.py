"""Digests of the files of a model, and of rows with their media: are they still the same?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import snapshot_download

from trl_vpo.data.columns import COLUMNS
from trl_vpo.data.identity import PAYLOAD
from trl_vpo.data.inputs import InputRow, hashed
from trl_vpo.data.raw_rows import RawRows
from trl_vpo.data.row_media import MEDIA
from trl_vpo.errors import MediaError
from trl_vpo.files import ENDS, THREADS, bytes_digest, ends_digest, file_digest, file_digests, json_digest
from trl_vpo.media.images import frame_folder, resolve_path

# The files that a model is loaded from: weights, configs, tokenizer, chat templates, its own code.
LOADED = (
    "*.json", "*.safetensors", "*.gguf", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "vocab.txt",
    "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
# Files that a training adds to the folder of its result.
NOT_LOADED = {"run.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}
MISSING = "missing"  # identifies a file that is not there
AT_ONCE = 256  # rows in memory


def model_files(name: str | Path, revision: str | None = None) -> dict[str, str]:
    """Return the digest of every file that a model is loaded from, by its name in the model's folder.

    Every byte counts: a merged adapter changes some tensors and leaves all others. Files of an adapter's base are
    under `base/`. The result is empty for a model that is neither a folder nor in the Hub's cache.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except (OSError, ValueError):  # of the Hub's client: not cached, or not a repo's name
            return {}
    files = file_digests(folder, _loaded(folder))
    if "adapter_config.json" in files and "config.json" not in files:
        base = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
        files |= {f"base/{name}": digest for name, digest in (model_files(base) if base else {}).items()}
    return files


def weights_digest(folder: str | Path) -> str:
    """Return one digest of the files of a folder's model, so that a change under the same name is noticed."""
    return files_digest(folder, _loaded(Path(folder)))


def files_digest(folder: str | Path, paths: Iterable[Path]) -> str:
    """Return one digest of files in a folder, of their names and contents."""
    lines = (f"{name} {digest}\n" for name, digest in file_digests(Path(folder), paths).items())
    return bytes_digest("".join(lines).encode(), size=8)


def adapter_digest(adapter: str | Path) -> str:
    """Return one digest of an adapter's files, so that a replaced adapter is noticed; of a Hub adapter, its name."""
    files = sorted(Path(adapter).glob("adapter_*"))
    return bytes_digest(b"".join(bytes.fromhex(file_digest(path)) for path in files)) if files else str(adapter)


def _loaded(folder: Path) -> list[Path]:
    paths = {path for pattern in LOADED for path in folder.glob(pattern) if path.name not in NOT_LOADED}
    return sorted(filter(Path.is_file, paths))


def row_digest(row: InputRow, media_root: str | None = None) -> dict[str, str]:
    """Return a digest of an input as its dataset gives it, under `row`, and one of each column of media.

    Media are identified as in `row_digests`. A column of which a file is missing has none.
    """
    media = {name: _media(value, media_root) for name, value in row.example.items() if name in MEDIA}
    digests = {name: json_digest(known) for name, known in media.items() if not _lacks_file(known)}
    return {"row": json_digest([row.id, row.example], default=hashed), **digests}


def row_digests(dataset: Dataset, media_root: str | None = None) -> np.ndarray:
    """Return (rows,) uint64: a digest of each row's texts, phrases, boxes, id and media.

    A media file, and each of a folder of frames, is identified by its size, beginning and end, wherever it is.
    """

    def digest(row: dict) -> int:
        values = {name: value for name, value in row.items() if value is not None}
        known = {name: _media(value, media_root) if name in MEDIA else value for name, value in values.items()}
        return int(json_digest(known, size=8), 16)

    dataset = dataset.with_format(None)  # without a transform, which may be random
    dataset = dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])
    rows = RawRows(dataset, json=MEDIA)  # JSON of texts stays text, as in the checkpoints of earlier versions
    digests: list[int] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(dataset), AT_ONCE):
            digests += pool.map(digest, rows.read(start, min(start + AT_ONCE, len(dataset))))
    return np.array(digests, np.uint64)


def _media(source: Any, root: str | None) -> Any:
    """Return the values that identify a medium."""
    if isinstance(source, bytes):
        return [len(source), bytes_digest(source[:ENDS] + source[-ENDS:])]
    if isinstance(source, dict):
        entries = {key: value for key, value in source.items() if value is not None}
        if "bytes" in entries:
            entries.pop("path", None)  # only its name
        return {key: _media(value, root) for key, value in entries.items()}
    if isinstance(source, list):
        return [_media(item, root) for item in source]
    if not isinstance(source, str):
        return source
    try:
        if frames := frame_folder(source, root):
            return [[frame.name, *ends_digest(frame)] for frame in frames]
        return ends_digest(resolve_path(source, root))
    except (MediaError, OSError):
        return MISSING


def _lacks_file(known: Any) -> bool:
    """Is a file missing among values that identify a medium?"""
    if isinstance(known, dict):  # other texts than these, such as a type, are no paths
        return any(_lacks_file(known[key]) for key in PAYLOAD if key in known)
    return any(map(_lacks_file, known)) if isinstance(known, list) else known == MISSING
