"""A run of `trl-vpo generate` is a folder: killed at any moment, the same command goes on where it stopped.

    settings.json             what decides the rows; a run with other settings is refused
    shards/R-of-W.jsonl       worker R of W: a line {"id", "rows", "reason", "kind", "notes"} for each finished input
    shards/R-of-W.lock        held as long as that worker lives; its pid
    .lock                     held while a worker starts or finishes
    media/                    media of inputs that had no path of their own (see `inputs`)
    rows.jsonl, rejected.jsonl, summary.json    once every input is finished (see `results`)

A line is written whole or cut off again. A line that its worker's death left torn is the last of its shard: it counts
for nothing, and the worker's next start cuts it off. Inputs are shared out by position, so workers never meet.

Every line is handed to the operating system at once, which keeps it when the process dies. It is forced to the disk
every few seconds, at the end and before the results are written: a crash of the whole machine costs seconds of work.

The locks (flock) end with the process that holds them, so none is ever stale. A file system without them is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trl_vpo.errors import GenerateError
from trl_vpo.generate.pipeline import Pipeline
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.results import RESULTS, encode, replace_file, write_results
from trl_vpo.runs.shards import Finished, check_settings, places, read_lines, read_outcomes

SYNC_SECONDS = 5.0


class Run:
    """One worker's hold on a run. A context manager; not for several threads.

    Args:
        folder: of the run; made if it is not there.
        settings: all that decides the rows, as JSON values. Batch sizes, timeouts and devices do not belong here.
        rank, world_size: this worker among those that work on the run at the same time. Once they have stopped, any
            other number of workers can go on.

    Raises:
        GenerateError: the folder is something else or cannot be written or locked, the settings are others, this
            worker is at work already, or workers of another `world_size` still are.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], *, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise GenerateError(f"worker {rank} of {world_size}: ranks go from 0 to {world_size - 1}.")
        self.folder, self.rank, self.world_size = Path(folder).absolute(), rank, world_size
        self._shards = self.folder / "shards"
        self._path = self._shards / f"{rank:05d}-of-{world_size:05d}.jsonl"
        self._shard = self._lock = None  # file descriptors
        self._end = 0  # bytes of the shard that are whole lines
        self._synced = time.monotonic()
        try:
            self._refuse_foreign()
            self._shards.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._claim()
                self._settle(settings)
                self._open_shard()
        except BaseException as error:
            self._drop()
            if isinstance(error, OSError):
                raise GenerateError(f"{self.folder} cannot hold a run ({error}). Name another output_dir.") from error
            raise
        _RUNS.add(self)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the run. What was written stays."""
        try:
            if self._shard is not None:
                self._sync()
        finally:
            self._drop()

    # --- work -------------------------------------------------------------------------------------------------

    def remaining(self, ids: Sequence[str]) -> list[int]:
        """The positions in `ids` that this worker still has to do: every `world_size`-th, unless any worker did it.

        Raises:
            GenerateError: an id stands in `ids` twice, or a shard is damaged.
        """
        _refuse_duplicates(ids)
        done = places(self.folder)
        return [i for i in range(self.rank, len(ids), self.world_size) if ids[i] not in done]

    def write(self, outcome: Outcome) -> None:
        """Record that an input is finished: its line, whole or not at all.

        Raises:
            GenerateError: a value that JSON cannot hold (nothing is written, the run stays open), or the line cannot
                be written (the shard is cut back to its last whole line, and the run is closed).
        """
        self._check_open()
        line = memoryview(encode(vars(outcome), f"input {outcome.id!r}").encode() + b"\n")
        written = 0
        try:
            while written < len(line):
                written += os.write(self._shard, line[written:])
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except BaseException as error:
            with suppress(OSError):  # where even this fails, the next start cuts the line off
                os.ftruncate(self._shard, self._end)
            self._drop()
            if isinstance(error, OSError):
                raise GenerateError(
                    f"{self._path}: input {outcome.id!r} cannot be written ({error.strerror or error}). Free space "
                    "there, then start the same command again: it goes on from this input."
                ) from error
            raise
        self._end += len(line)

    def outcomes(self) -> Iterator[Outcome]:
        """What is finished so far, by all workers, shard by shard."""
        return read_outcomes(self.folder)

    def finish(self, ids: Sequence[str], pipeline: Pipeline) -> dict[str, Any] | None:
        """Write the results if every input is finished and no other worker is at work.

        To be called by every worker when it has done its share, of which it lets go: nothing is written after this. Of
        workers that end at the same moment, one writes the results.

        Args:
            ids: of all inputs, in order. Finished inputs that are not among them are left out.
            pipeline: whose `select` has the last word on the outcomes and whose `summarize` gives the figures; both
                get them in the order of the inputs, in a sequence that reads each from the disk.

        Returns:
            the summary; None while other workers are at work: the last of them writes the results.

        Raises:
            GenerateError: as `remaining`; or a figure that JSON cannot hold, or a file that cannot be written.
        """
        self._check_open()
        _refuse_duplicates(ids)
        self._sync()
        with self._alone():
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            if any(map(self._at_work, self._shards.glob("*.lock"))):
                return None
            done = places(self.folder)
            found = [done.get(name) for name in ids]
            if None in found:
                return None
            for part in self.folder.glob("media/.*.part"):  # of workers that were killed
                part.unlink(missing_ok=True)
            with Finished(found) as outcomes:
                return write_results(self.folder, outcomes, pipeline)

    # --- starting -----------------------------------------------------------------------------------------------

    def _refuse_foreign(self) -> None:
        found = [name for name in RESULTS if (self.folder / name).exists()]
        if found and not (self.folder / "settings.json").exists():
            raise GenerateError(
                f"{self.folder} holds {', '.join(found)} but no settings.json: it is not a run that can go on, and "
                "nothing of it is overwritten. Name another output_dir."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other worker starts or finishes meanwhile."""
        with open(self.folder / ".lock", "ab") as file:
            _flock(file.fileno(), fcntl.LOCK_EX, self.folder)
            yield

    def _claim(self) -> None:
        """Take this worker's lock, and see that nobody holds one of another `world_size`."""
        path = self._path.with_suffix(".lock")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, self.folder):
            raise GenerateError(
                f"{self.folder}: worker {self.rank} of {self.world_size} is already at work, {_holder(path)}. Wait "
                "until it is done or stop it, or name another output_dir."
            )
        for other in sorted(self._shards.glob("*-of-*.lock")):
            rank, world_size = map(int, other.stem.split("-of-"))
            if world_size != self.world_size and self._at_work(other):
                raise GenerateError(
                    f"{self.folder}: worker {rank} of {world_size} is still at work, {_holder(other)}, so the "
                    f"inputs cannot be shared among {self.world_size}. Stop the workers of that run, then start "
                    "as many as you like."
                )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"pid {os.getpid()} on {platform.node()}".encode(), 0)

    def _at_work(self, lock: Path) -> bool:
        """Whether a worker holds this lock."""
        with lock.open("r+b") as file:
            return not _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, self.folder)

    def _settle(self, settings: dict[str, Any]) -> None:
        """Write the settings, or see that they are those of the run."""
        path = self.folder / "settings.json"
        new = json.loads(encode(settings, "settings"))
        if not path.exists():
            replace_file(path, [json.dumps(new, indent=2, ensure_ascii=False)])
            return
        check_settings(self.folder, new)

    def _open_shard(self) -> None:
        """Open this worker's shard behind its last whole line."""
        self._shard = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for start, line, _ in read_lines(self._path):
            self._end = start + len(line)
        if os.fstat(self._shard).st_size > self._end:
            os.ftruncate(self._shard, self._end)

    # --- ending -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._shard is None:
            raise GenerateError(f"{self.folder}: this run is closed. Open it again to go on.")

    def _sync(self) -> None:
        os.fsync(self._shard)
        self._synced = time.monotonic()

    def _drop(self) -> None:
        """Close the files, and with them the lock."""
        for name in ("_shard", "_lock"):
            if getattr(self, name) is not None:
                os.close(getattr(self, name))
                setattr(self, name, None)


_RUNS: weakref.WeakSet[Run] = weakref.WeakSet()


def _drop_runs() -> None:
    for run in list(_RUNS):
        run._drop()


# A forked child shares its parent's locks: it would keep them when the parent dies.
os.register_at_fork(after_in_child=_drop_runs)


def _refuse_duplicates(ids: Sequence[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for position, name in enumerate(ids):
        if first.setdefault(name, position) != position:
            raise GenerateError(
                f"rows {first[name]} and {position} of the inputs both have the id {name!r}. Give every row its own."
            )


def _flock(file: int, how: int, folder: Path) -> bool:
    """Whether the lock was taken."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise GenerateError(
            f"{folder}: this file system has no file locks ({error}), without which workers would do each other's "
            "inputs. Put output_dir on a local disk, or have it mounted with locks (NFS: without nolock; Lustre: with "
            "flock)."
        ) from error
    return True


def _holder(lock: Path) -> str:
    return lock.read_text(errors="replace") or "pid unknown"
