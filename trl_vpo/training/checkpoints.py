"""Checkpoints on disk: which are whole, which one to go on from, which to delete.

`transformers` writes `checkpoint-N/` in place: weights, optimizer.pt, scheduler.pt, rng_state*.pth, and
trainer_state.json last. A run that is killed meanwhile leaves a folder that looks like a checkpoint. So each one gets
`complete.json` once all processes have written their files and the disk has them: sizes and hashes of the files, what
the run was, and a hash of all that. Training goes on from no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from trl_vpo.errors import CheckpointError

MARKER = "complete.json"
FORMAT = 2  # of the marker; 1 was without a hash of its own
HASHED = 2**30  # bytes; larger files are compared by their size alone, reading them back would hold up every save
# Where transformers reads a checkpoint.
LOADS = {"_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler"}
_NAME = re.compile(r"checkpoint-(\d+)")


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
    content = {"format": FORMAT, "files": files, **content}
    part.write_text(json.dumps({"sha256": _hash(content), **content}, indent=1), encoding="utf-8")
    _to_disk(part)
    os.replace(part, folder / MARKER)
    for parent in (folder, folder.parent):
        _to_disk(parent)


def read_marker(folder: Path) -> dict | None:
    """What `mark_complete` wrote; None where there is no marker, or not as it was written."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sha256, number = marker.pop("sha256", None), marker["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if number == 1 or (number == FORMAT and sha256 == _hash(marker)) else None


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def find_problems(folder: Path) -> list[str]:
    """Why training cannot go on from a checkpoint: what is missing, cut short or changed. Empty: it can."""
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / MARKER).is_file():
        return [f"{MARKER}, the last file, is missing: its saving was interrupted, or it is another program's"]
    marker = read_marker(folder)
    if marker is None:
        return [f"{MARKER} is not what was saved"]
    found = _changed(folder, marker["files"])
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
    if not sharded and not any(folder.rglob("*.safetensors")):
        problems.append("the weights (adapter_model.safetensors or model.safetensors) are missing")
    if not any(name == "optimizer.pt" or name.startswith("optimizer") for name in names):
        problems.append("optimizer.pt is missing (interrupted, or saved with save_only_model)")
    if "scheduler.pt" not in names:
        problems.append("scheduler.pt is missing")
    if not any(name.startswith("rng_state") for name in names):
        problems.append("rng_state.pth is missing")
    return problems


@contextmanager
def explain_failed_loads(folder: Path | None) -> Iterator[None]:
    """Name the file that cannot be read: the marker does not say it of large ones, and never of the next version.

    Raises:
        CheckpointError: in place of the many errors of pickle, zipfile, torch and safetensors.
    """
    try:
        yield
    except Exception as error:
        if folder is None or not LOADS & {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{_unreadable(folder) or folder} cannot be read: {reason}. Put the file back, or delete {folder}: "
            "training then goes on from the checkpoint before it."
        ) from error


def _unreadable(folder: Path) -> Path | None:
    for path in _files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):  # compares its header with the size of the file
                    pass
            elif path.suffix in (".pt", ".pth"):  # what torch.save writes, with a checksum of each part
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():
                        return path
        except Exception:  # whatever they raise
            return path
    return None


# --- which to take, which to delete ---------------------------------------------------------------------------------


def newest_complete(output_dir: str | Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that training can go on from; None where none was ever finished.

    Args:
        output_dir: the folder of the run.
        say: told of each newer one that is not whole, and why.

    Raises:
        CheckpointError: checkpoints were finished, but none is whole any more.
    """
    broken: dict[Path, list[str]] = {}
    folders = _in_order(output_dir)
    for at, folder in enumerate(folders):
        problems = find_problems(folder)
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
    finished = [folder for folder in broken if (folder / MARKER).is_file()]
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
