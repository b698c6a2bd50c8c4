"""Checkpoints on disk: which are complete, which one to continue from, which to delete.

`transformers` writes `checkpoint-N/` in place: weights, optimizer.pt, scheduler.pt, rng_state*.pth, and
trainer_state.json last. A run that is killed meanwhile leaves a folder that looks like a checkpoint. So each one gets
`complete.json` once all processes have written their files and the disk has them: sizes and digests of the files, what
the run was, and a digest of all that. Training continues from no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trl_vpo.errors import CheckpointError
from trl_vpo.files import atomic_write, file_digest
from trl_vpo.training.main_process import print_main

MARKER = "complete.json"
FORMAT = 2  # of the marker
HASHED = 2**30  # bytes; larger files are compared by their size alone, reading them back would hold up every save
NEEDED = {  # a file of every checkpoint that can be continued exactly: what it is called without DeepSpeed or FSDP
    r"trainer_state\.json$": "trainer_state.json",
    r"optim": "optimizer.pt",  # not there with save_only_model
    r"scheduler\.pt|latest$": "scheduler.pt",
    r"rng_state|latest$": "rng_state.pth",
    r"\.safetensors$|latest$|^pytorch_model_fsdp": "adapter_model.safetensors or model.safetensors",
}
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    """The N of `checkpoint-N`."""
    return int(_NAME.fullmatch(folder.name).group(1))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-N`, complete or not, newest first."""
    folders = Path(output_dir).glob("checkpoint-*")
    return sorted((f for f in folders if f.is_dir() and _NAME.fullmatch(f.name)), key=step_of, reverse=True)


# --- the marker -----------------------------------------------------------------------------------------------------


def mark_complete(folder: Path, **content) -> None:
    """Write the marker, after everything else has reached the disk. One process calls this, once all have saved."""
    (folder / MARKER).unlink(missing_ok=True)  # of a checkpoint that this one was written over
    part = f".{MARKER}.new.part"  # of one that was killed meanwhile
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != part):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = _size_and_digest(path)
    markers = filter(None, map(read_marker, list_checkpoints(folder.parent)))
    saved = max([time.time(), *(marker.get("saved", 0) + 1e-6 for marker in markers)])  # clocks of nodes may differ
    content = {"format": FORMAT, "files": files, "saved": saved, **content}
    with atomic_write(folder / MARKER, token="new") as part:
        part.write_text(json.dumps({"sha256": _sha256(content), **content}, indent=1), encoding="utf-8")
    for parent in (folder, folder.parent):
        _flush(parent)


def read_marker(folder: Path) -> dict | None:
    """Return what `mark_complete` wrote; None where there is no marker, or not as this version wrote it."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        digest = marker.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if digest == _sha256(marker) else None


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_and_digest(path: Path) -> dict:
    size = path.stat().st_size
    return {"size": size} if size > HASHED else {"size": size, "sha256": file_digest(path)}


# --- what is wrong with a checkpoint --------------------------------------------------------------------------------


def find_problems(folder: Path) -> list[str]:
    """Say why training cannot continue from a checkpoint: what is missing, cut short or changed. Empty: it can."""
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / MARKER).is_file():
        return [f"{MARKER}, the last file, is missing: its saving was interrupted, or it is another program's"]
    marker = read_marker(folder)
    if marker is None:
        number = re.search(r'"format": (\d+)', (folder / MARKER).read_text(errors="replace"))
        other = number is not None and int(number[1]) != FORMAT
        return ["another version of TRL-VPO saved it" if other else f"{MARKER} is not what was saved"]
    if marker.get("no_resume"):
        return [marker["no_resume"]]
    saved = marker["files"]
    lost = [name for pattern, name in NEEDED.items() if not any(re.search(pattern, file) for file in saved)]
    lost += [name for name in saved if not (folder / name).is_file()]
    changed = [name for name in saved if name not in lost and _size_and_digest(folder / name) != saved[name]]
    return [f"{name} is missing" for name in lost] + [f"{name} is not what was saved" for name in changed]


def why_no_resume(args: Any) -> str | None:
    """Say why training will not continue from any checkpoint of a run with these arguments; None: it will."""
    if args.save_only_model:
        return "save_only_model leaves the optimizer out of it"
    if getattr(args, "sync_ref_model", False):
        return "sync_ref_model moves the reference in training, which no checkpoint holds"
    return None


def best_of(checkpoint: Path) -> Path | None:
    """Return the best checkpoint of a run until this one. It lies beside it, also where their folder was moved."""
    best = json.loads((checkpoint / "trainer_state.json").read_bytes()).get("best_model_checkpoint")
    if not best:
        return None
    beside, recorded = checkpoint.parent / Path(best).name, Path(best)
    return recorded if recorded.is_dir() and not beside.is_dir() else beside


# --- which to take, which to delete ---------------------------------------------------------------------------------


def newest_complete(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that training can continue from, and print why newer ones are not complete.

    None where none was ever finished. Raises CheckpointError where some were, but none is complete any more.
    """
    broken: dict[Path, str] = {}
    folders = _in_order(output_dir)
    for at, folder in enumerate(folders):
        if problems := find_problems(folder):
            broken[folder] = "; ".join(problems)
            continue
        for other, why in broken.items():
            print_main(f"{other} is not complete: {why}. It is left as it is, and {folder.name} is taken instead.")
        later = [f.name for f in folders[at + 1 :] if step_of(f) > step_of(folder)]
        if later:
            print_main(
                f"{', '.join(later)} of an earlier run in {output_dir} passed over. To continue from one of them, "
                "name it in place of true."
            )
        return folder
    finished = [folder for folder in broken if (folder / MARKER).is_file()]
    if finished:
        lines = "".join(f"\n  - {folder}: {broken[folder]}" for folder in finished)
        raise CheckpointError(
            f"training cannot continue from any checkpoint of {output_dir}:{lines}\nPut the files back, continue with "
            "the version that saved them, or delete these folders to start from scratch."
        )
    for folder, why in broken.items():
        print_main(f"{folder} is not complete: {why}. There is no other to continue from.")
    return None


def _in_order(output_dir: str | Path) -> list[Path]:
    """All checkpoints, the last saved first.

    A run that starts from scratch in the folder of another leaves that one's later checkpoints where they are.
    """
    folders = list_checkpoints(output_dir)
    return sorted(folders, key=lambda f: (read_marker(f) or {}).get("saved", f.stat().st_mtime), reverse=True)


def delete_older(
    output_dir: str | Path, limit: int | None, newest: Path, *, best: str | None = None, in_use: Collection[Path] = ()
) -> None:
    """Apply `save_total_limit` after `newest` was marked: keep `limit` checkpoints, the best one, and those in use.

    Unlike transformers' own, which deletes before the other processes have saved and takes half a checkpoint for one.
    Checkpoints of later steps belong to an earlier run and stay.
    """
    if not limit or limit < 0:
        return
    folders = [f for f in list_checkpoints(output_dir) if step_of(f) <= step_of(newest)]
    folders.sort(key=lambda folder: ((folder / MARKER).is_file(), step_of(folder)))  # half-written ones go first
    kept = {newest.name} | ({Path(best).name} if best else set())
    surplus = len(folders) - max(limit, len(kept))
    for folder in [f for f in folders if f.name not in kept][: max(surplus, 0)]:
        if folder not in in_use:
            (folder / MARKER).unlink(missing_ok=True)  # first, so that half of it is not taken for a damaged one
            shutil.rmtree(folder, ignore_errors=True)


def what_is_left(output_dir: str | Path) -> str:
    """Say which checkpoint the next run will continue from."""
    for folder in _in_order(output_dir):
        if marker := read_marker(folder):
            last, why = f"The last complete checkpoint is {folder}.", marker.get("no_resume")
            if why:
                return f"{last} Training cannot continue from it: {why}. The same command starts a new run."
            return f"{last} Continue with the same command and --resume_from_checkpoint true."
    return "There is no complete checkpoint: the next run starts from scratch."
