"""The folder of a resumable run. Killed at any moment, the same command continues it: no input is lost or done twice.

    settings.json          what decides the rows; a run with other settings is refused
    shards/R-of-W.jsonl    worker R of W, locked while it lives: the `Outcome` of each finished input, one per line
    .lock                  held while a worker starts or finishes
    media/                 media of inputs that had no path (see `trl_vpo.data.inputs`)
    rows.jsonl, rejected.jsonl, summary.json    once every input is finished (see `results`)

Inputs are divided by position, so workers never meet. A torn line that a killed worker left is the last of its shard:
it is ignored, and the worker's next start cuts it off. The locks (flock) end with the process that
holds them, so none is ever stale. A file system without them is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_vpo.errors import RunError
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.results import RESULTS, Report, encode, write_lines, write_results

_SHARD = re.compile(r"(\d{5,})-of-(\d{5,})\.jsonl")


class Run:
    """One worker's hold on a run. A context manager; not for several threads.

    `settings` are all that decides the rows, as JSON values. `rank` is this worker among the `world_size` that are at
    work. Once they have stopped, any other number can continue. Raises RunError where the folder is something else or
    cannot be written or locked, the settings differ, or this worker or workers of another `world_size` are at work.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], *, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise RunError(f"worker {rank} of {world_size}: ranks go from 0 to {world_size - 1}.")
        self.folder, self.rank, self.world_size = Path(folder).absolute(), rank, world_size
        self._path = self.folder / f"shards/{rank:05d}-of-{world_size:05d}.jsonl"
        self._shard: int | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _starting_or_finishing(self.folder):
                self._open_shard()
                check_settings(self.folder, settings)
                if not (self.folder / "settings.json").exists():
                    write_lines(self.folder / "settings.json", [encode(settings, "settings", indent=2)])
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise RunError(f"{self.folder} cannot hold a run ({error}). Name another output_dir.") from error
            raise
        _RUNS.add(self)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; what was written stays."""
        if self._shard is not None:
            os.close(self._shard)
            self._shard = None

    def remaining(self, ids: Sequence[str]) -> list[int]:
        """Return the positions in `ids` of this worker's unfinished inputs; every `world_size`-th input is its own."""
        done = _finished(self.folder).keys()
        return [i for i in range(self.rank, len(ids), self.world_size) if ids[i] not in done]

    def write(self, outcome: Outcome) -> None:
        """Record that an input is finished. Only a crash of the whole machine can lose the last seconds of work.

        Raises RunError where JSON cannot hold a value (nothing is written), or the line cannot be written.
        """
        line = memoryview(encode(vars(outcome), f"input {outcome.id!r}").encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._shard, line) :]
        except OSError as error:
            self.close()  # nothing may follow the torn line
            raise RunError(
                f"{self._path}: input {outcome.id!r} cannot be written ({error.strerror or error}). Free space there, "
                "then start the same command again: it continues with this input."
            ) from error

    def finish(self, ids: Sequence[str], report: Report) -> dict[str, Any] | None:
        """Write the results and return the summary if every input is finished and no other worker is at work.

        None: the last worker writes them, one of those that end at the same moment. Finished inputs that are not among
        `ids` are left out.
        """
        with _starting_or_finishing(self.folder):
            self.close()
            if any(_is_locked(path) for path in _shards(self.folder)):
                return None
            finished = _finished(self.folder)
            if not all(name in finished for name in ids):
                return None
            for part in self.folder.glob("media/.*.part"):  # of workers that were killed
                part.unlink(missing_ok=True)
            return write_results(self.folder, [finished[name] for name in ids], report)

    def _open_shard(self) -> None:
        """Lock this worker's shard, refuse living workers of another `world_size`, and cut off a torn line."""
        self._shard = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if not _lock(self._shard, self.folder):
            raise RunError(
                f"{self.folder}: worker {self.rank} of {self.world_size} is already at work (`fuser {self._path}` "
                "shows its process). Wait until it is done or stop it, or name another output_dir."
            )
        for other in _shards(self.folder):
            rank, world_size = map(int, _SHARD.fullmatch(other.name).groups())
            if world_size != self.world_size and _is_locked(other):
                raise RunError(
                    f"{self.folder}: worker {rank} of {world_size} is still at work (`fuser {other}` shows its "
                    f"process), so the inputs cannot be shared among {self.world_size}. Stop the workers of that run "
                    "first."
                )
        valid_bytes = sum(size for size, _ in _read_shard(self._path))
        if os.fstat(self._shard).st_size > valid_bytes:
            os.ftruncate(self._shard, valid_bytes)


_RUNS: weakref.WeakSet[Run] = weakref.WeakSet()
# A forked child shares its parent's locks: it would keep them when the parent dies.
os.register_at_fork(after_in_child=lambda: [run.close() for run in list(_RUNS)])


# --- locks --------------------------------------------------------------------------------------------------------


@contextmanager
def _starting_or_finishing(folder: Path) -> Iterator[None]:
    """Hold the lock under which workers start and finish, one at a time."""
    with open(folder / ".lock", "ab") as file:
        _lock(file.fileno(), folder, wait=True)
        yield


def _is_locked(shard: Path) -> bool:
    """Return whether the shard's worker is alive."""
    with shard.open("ab") as file:
        return not _lock(file.fileno(), shard.parent.parent)


def _lock(file: int, folder: Path, *, wait: bool = False) -> bool:
    """Lock a file until it is closed, and return whether that worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(
            f"{folder}: this file system has no file locks ({error}), without which two workers could do the "
            "same input. Put output_dir on a local disk, or have it mounted with locks (NFS: without nolock; Lustre: "
            "with flock)."
        ) from error
    return True


# --- settings -----------------------------------------------------------------------------------------------------


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings that a run was started with; raise RunError if the folder is not a run."""
    path = Path(folder) / "settings.json"
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise RunError(
            f"{folder} is not a run that can be continued: its settings.json is missing or damaged ({error}). Restore "
            "it, or delete the folder to start over."
        ) from error


def check_settings(folder: str | Path, settings: dict[str, Any]) -> None:
    """Check that the folder is new or holds a run with these settings; it may have recorded further ones.

    Raises RunError, which names each that differs.
    """
    folder = Path(folder)
    if not (folder / "settings.json").exists():
        if results := [name for name in RESULTS if (folder / name).exists()]:
            raise RunError(
                f"{folder} holds {', '.join(results)} but no settings.json: it is not a run that can be continued, "
                "and nothing in it is overwritten. Name another output_dir."
            )
        return
    old, new = read_settings(folder), json.loads(encode(settings, "settings"))
    changes = [f"\n  {change}" for key in sorted(new) for change in _changes(old.get(key, ...), new[key], key)]
    if changes:
        raise RunError(
            f"{folder} was started with other settings; rows of both would be mixed:{''.join(changes)}\nName another "
            "output_dir, or delete the folder to start over."
        )


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    """Yield a line for each setting that differs; nested ones by their dotted names."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key, ...), new.get(key, ...), f"{name}.{key}")
    elif old != new and (old, new) != (..., None):  # an older version did not have the setting
        was, now = ("not set" if value is ... else json.dumps(value, ensure_ascii=False) for value in (old, new))
        yield f"{name}: was {was:.200}, is {now:.200}"


# --- finished inputs ----------------------------------------------------------------------------------------------


def read_outcomes(folder: str | Path) -> Iterator[Outcome]:
    """Return the finished outcomes of a run, shard by shard, also while it is at work."""
    read_settings(folder)
    return (outcome for path in _shards(folder) for _, outcome in _read_shard(path))


def _shards(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder, "shards").glob("*.jsonl") if _SHARD.fullmatch(path.name))


def _finished(folder: Path) -> dict[str, Outcome]:
    """Return all outcomes by the ids of their inputs."""
    finished: dict[str, Outcome] = {}
    for outcome in read_outcomes(folder):
        if outcome.id in finished:
            raise RunError(
                f"input {outcome.id!r} was finished twice in {folder}/shards: two programs worked on the same inputs. "
                "Delete one of the two lines, or the folder."
            )
        finished[outcome.id] = outcome
    return finished


def _read_shard(path: Path) -> Iterator[tuple[int, Outcome]]:
    """Yield (bytes of the line, outcome). A torn last line is skipped: its worker died, or is writing."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # more of it may come while it is read
                return
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                if not next(file, b""):
                    return
                raise RunError(
                    f"{path}, line {number} is damaged: {line[:80]!r}. A killed run leaves only a last line torn, so "
                    "something else wrote into the file or the disk failed. Delete this line, and its input is done "
                    "again."
                ) from None
            yield len(line), outcome
