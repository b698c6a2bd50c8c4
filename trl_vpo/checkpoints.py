"""Checkpoints on disk: which are whole, which one to go on from, which to delete.

`transformers` writes `checkpoint-N/` in place: weights, optimizer.pt, scheduler.pt, rng_state*.pth, and
trainer_state.json last. A run that is killed meanwhile leaves a folder that looks like a checkpoint. So each one gets
`complete.json` once all processes have written their files and the disk has them: sizes and hashes of the files, and
what the run was. A checkpoint of plain TRL has none; it is taken if everything that resuming needs is there and opens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKER = "complete.json"
FORMAT = 1  # of the marker
HASHED = 2**30  # bytes; larger files are compared by their size alone, reading them back would hold up every save
SIGN = "MarkedWhenComplete"  # stands among the callbacks in trainer_state.json where a marker was to follow
INCOMPLETE = "checkpoint-is-incomplete.txt"  # left by transformers' own checkpoint on SIGTERM
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from. Says which, and what is wrong with it."""


def step_of(folder: Path) -> int:
    """The N of `checkpoint-N`."""
    return int(_NAME.fullmatch(folder.name).group(1))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-N`, whole or not, newest first."""
    folders = Path(output_dir).glob("checkpoint-*")
    return sorted((f for f in folders if f.is_dir() and _NAME.fullmatch(f.name)), key=step_of, reverse=True)


# --- the marker ---------------------------------------------------------------------------------------------------


def mark_complete(folder: Path, **content) -> None:
    """Write the marker, after everything else has reached the disk. One process calls this, once all have saved.

    Args:
        folder: the checkpoint.
        content: what else the marker holds.

    Raises:
        OSError: the disk does not take it.
    """
    (folder / MARKER).unlink(missing_ok=True)  # of a checkpoint that this one was written over
    files = {}
    for path in _files(folder):
        _to_disk(path)
        files[path.relative_to(folder).as_posix()] = _fingerprint(path)
    part = folder / f"{MARKER}.part"
    part.write_text(json.dumps({"format": FORMAT, "files": files, **content}, indent=1), encoding="utf-8")
    _to_disk(part)
    os.replace(part, folder / MARKER)
    for parent in (folder, folder.parent):
        _to_disk(parent)


def read_marker(folder: Path) -> dict | None:
    """What `mark_complete` wrote; None where there is no marker, or none that can be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("format") == FORMAT and "files" in marker else None


def _files(folder: Path) -> list[Path]:
    """All files of a checkpoint but its marker."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MARKER, f"{MARKER}.part"))


def _to_disk(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict:
    size = path.stat().st_size
    if size > HASHED:
        return {"size": size}
    with path.open("rb") as file:
        return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- what is wrong with a checkpoint --------------------------------------------------------------------------------


def find_problems(folder: Path, processes: int, *, signed_without_marker: bool = True) -> list[str]:
    """Why training cannot go on from a checkpoint: the files that are missing, cut short or changed. Empty: it can.

    Args:
        folder: the checkpoint.
        processes: how many there are now. Another number than when it was saved is no problem of the folder's files.
        signed_without_marker: count it as a problem that the marker is missing where it was to follow. A checkpoint
            from the Hub may be without: transformers uploads it before it is marked.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    marker = read_marker(folder)
    if marker:
        found = _changed(folder, marker["files"])
    else:
        found = [f"{MARKER}, the last file, is missing"] if signed_without_marker and _is_signed(folder) else []
        found += [*_unreadable(folder), *_missing_rng(folder, processes)]
    return found + [problem for problem in _missing(folder) if problem not in found]


def _changed(folder: Path, files: dict[str, dict]) -> list[str]:
    problems = []
    for name, saved in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != saved["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes of {saved['size']}")
        elif _fingerprint(path) != saved:
            problems.append(f"{name} is not what was saved")
    return problems


def _missing(folder: Path) -> list[str]:
    """What going on exactly needs. DeepSpeed and FSDP keep weights and optimizer in folders of their own."""
    names = {path.name for path in folder.iterdir()}
    problems = [] if "trainer_state.json" in names else ["trainer_state.json is missing"]
    if "latest" in names:  # of DeepSpeed, written after its folder
        return problems
    sharded = any(name.startswith("pytorch_model_fsdp") for name in names)
    if not sharded and not any(folder.rglob("*.safetensors")) and not any(folder.rglob("*model*.bin")):
        problems.append("the weights (adapter_model.safetensors or model.safetensors) are missing")
    if not any(name == "optimizer.pt" or name.startswith("optimizer") for name in names):
        problems.append("optimizer.pt is missing (interrupted, or saved with save_only_model)")
    if "scheduler.pt" not in names:
        problems.append("scheduler.pt is missing")
    if not any(name.startswith("rng_state") for name in names):
        problems.append("rng_state.pth is missing")
    return problems


def _missing_rng(folder: Path, processes: int) -> list[str]:
    """Each process writes its own: of a checkpoint without a marker all must be there."""
    if (folder / "rng_state.pth").is_file() or not any(folder.glob("rng_state_*.pth")):
        return []
    names = [f"rng_state_{rank}.pth" for rank in range(processes)]
    return [f"{name} is missing" for name in names if not (folder / name).is_file()]


def saved_by(folder: Path) -> int:
    """How many processes saved a checkpoint, by its files."""
    return 1 if (folder / "rng_state.pth").is_file() else len(list(folder.glob("rng_state_*.pth")))


def _unreadable(folder: Path) -> list[str]:
    """Files that do not open, of a checkpoint whose marker cannot say."""
    problems = [f"{INCOMPLETE} says that it was not finished"] if (folder / INCOMPLETE).exists() else []
    checks: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_bytes()),
        ".safetensors": _open_safetensors,
        ".pt": lambda path: zipfile.ZipFile(path).close(),  # what torch.save writes; its directory is at the end
        ".pth": lambda path: zipfile.ZipFile(path).close(),
        ".bin": lambda path: zipfile.ZipFile(path).close(),
    }
    for path in _files(folder):
        try:
            if path.suffix in checks:
                checks[path.suffix](path)
            if path.name.endswith(".index.json"):
                shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
                problems += [f"{shard} is missing" for shard in shards if not (path.parent / shard).is_file()]
        except Exception:  # whatever json, safetensors and zipfile raise on half a file
            problems.append(f"{path.relative_to(folder).as_posix()} is cut short")
    return problems


def _is_signed(folder: Path) -> bool:
    """Saved by this package, not by plain TRL."""
    try:
        return SIGN in json.loads((folder / "trainer_state.json").read_bytes())["stateful_callbacks"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_safetensors(path: Path) -> set[str]:
    """The names of its tensors; opening compares the header with the size of the file."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def saved_tensors(folder: Path) -> set[str]:
    """The names of all tensors in a checkpoint's safetensors files."""
    return set().union(*map(_open_safetensors, folder.glob("*.safetensors")))


# --- which to take, which to delete ---------------------------------------------------------------------------------


def newest_complete(output_dir: str | Path, processes: int, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that training can go on from; None where none was ever finished.

    Args:
        output_dir: the folder of the run.
        processes: as `find_problems`.
        say: told of each newer one that is not whole, and why.

    Raises:
        CheckpointError: checkpoints were finished, but none is whole any more.
    """
    broken: dict[Path, list[str]] = {}
    folders = _in_order(output_dir)
    for at, folder in enumerate(folders):
        problems = find_problems(folder, processes)
        if not problems:
            for other, why in broken.items():
                say(f"{other} is not complete: {'; '.join(why)}. Left as it is; {folder.name} is taken in its place.")
            later = [f.name for f in folders[at + 1 :] if step_of(f) > step_of(folder)]
            if later:
                say(
                    f"{', '.join(later)}: of an earlier run in {output_dir}, and passed over. Name one in place of "
                    "true to go on from it."
                )
            return folder
        broken[folder] = problems
    finished = [folder for folder in broken if read_marker(folder) is not None]
    if finished:
        lines = "".join(f"\n  - {folder}: {'; '.join(broken[folder])}" for folder in finished)
        raise CheckpointError(
            f"no checkpoint of {output_dir} can be gone on from:{lines}\nPut the files back, or delete these "
            "folders to start from scratch."
        )
    for folder, why in broken.items():
        say(f"{folder} is not complete: {'; '.join(why)}. There is no other to go on from.")
    return None


def _in_order(output_dir: str | Path) -> list[Path]:
    """All checkpoints, the one to go on from first: an earlier run's come behind those of the last one.

    A run that starts from scratch in the folder of another leaves that one's later checkpoints where they are.
    """
    attempts = {folder: _attempt(folder) for folder in list_checkpoints(output_dir)}
    last = max((number for number in attempts.values() if number is not None), default=0)
    return sorted(attempts, key=lambda folder: -last if attempts[folder] is None else -attempts[folder])


def _attempt(folder: Path) -> int | None:
    """Which of the runs in its folder saved a checkpoint; None where no marker says so."""
    marker = read_marker(folder)
    return None if marker is None else marker.get("attempt", 0)


def next_attempt(output_dir: str | Path) -> int:
    """The number of a run that starts from scratch: 1 in an empty folder."""
    return 1 + max((_attempt(folder) or 0 for folder in list_checkpoints(output_dir)), default=0)


def delete_older(output_dir: str | Path, limit: int | None, newest: Path, best: str | None) -> None:
    """`save_total_limit`, after `newest` was marked: of the checkpoints up to it, keep `limit`, and the best always.

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
        (folder / MARKER).unlink(missing_ok=True)  # first, so that half of it is not taken for a damaged one
        shutil.rmtree(folder, ignore_errors=True)


def what_is_left(output_dir: str | Path) -> str:
    """Which checkpoint a next run will go on from, for messages."""
    for folder in _in_order(output_dir):
        if read_marker(folder):
            return (
                f"The last complete checkpoint is {folder}. Go on with the same command and "
                "--resume_from_checkpoint true."
            )
    return "There is no complete checkpoint: the next run starts from scratch."
