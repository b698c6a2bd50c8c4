"""The rows of a stream, known by their text in its files: are those that a run was on still the same?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trl_vpo.data.json_files import raw_records
from trl_vpo.data.paths import row_format
from trl_vpo.data.sources import local_splits
from trl_vpo.files import bytes_digest, ends_digest, json_digest

MOST = 2**30  # bytes of all files together; larger ones are not read whole at every start


def stream_files(given: Mapping[str, Any], split: str) -> list[Path]:
    """Return the files that the arguments name as a split; empty where they are not on this machine."""
    name = given.get("dataset_name")
    if given.get("datasets") or not name or not Path(name).exists():
        return []
    part = local_splits(Path(name)).get(split, [])
    return part if isinstance(part, list) else [Path(file["filename"]) for file in part.cache_files]


def text_digests(files: list[Path]) -> np.ndarray | None:
    """Return (rows,) uint64: a digest of each row's text. None: the files are no JSON, or large (`MOST`)."""
    if not files or row_format(files[0]) != "json" or sum(file.stat().st_size for file in files) > MOST:
        return None
    rows = (raw for file in files for _, _, raw in raw_records(file))
    digests = (bytes_digest(r.strip(), 8) if isinstance(r, bytes) else json_digest(r, 8) for r in rows)
    return np.array([int(digest, 16) for digest in digests], np.uint64)


def describe_stream(trainer: Any, files: list[Path]) -> dict:
    """Return what the order of a stream's rows depends on, and its files: their sizes, beginnings and ends."""
    args = trainer.args
    in_order = trainer.train_dataset.num_shards == 1 or args.dataloader_num_workers <= 1
    # Otherwise each worker has files of its own.
    return {"workers": None if in_order else max(args.dataloader_num_workers, 1), "files": files_identity(files)}


def files_identity(files: Iterable[Path]) -> dict[str, list]:
    """Return the size and a digest of the beginning and the end of each file, by its name."""
    return {file.name: ends_digest(file) for file in files}


def compare_streams(saved: dict | None, now: dict | None, *, same_rows: bool) -> list[str]:
    """Return what is refused, one line each. With `same_rows`, the rows themselves are compared (`text_digests`)."""
    if not saved or not now:  # no stream, or saved before this was known
        return []
    refused = []
    if saved["workers"] != now["workers"]:
        refused.append(
            f"dataloader_num_workers: {saved['workers'] or 'at most 1'} when it was saved, "
            f"{now['workers'] or 'at most 1'} now. The rows of a stream of several files would come in another order"
        )
    old, new = saved["files"], now["files"]
    if not same_rows and old and new and list(old.values()) != list(new.values()):
        names = [name for name in new if new[name] not in old.values()] or list(new)
        refused.append(f"rows: {', '.join(names[:5])} of the stream changed, and which rows did is not known")
    return refused
