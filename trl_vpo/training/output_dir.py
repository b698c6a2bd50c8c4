"""The folder of a run: one training at a time writes to it, and what it cannot take is known before training."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trl_vpo.errors import OutputDirError
from trl_vpo.training.main_process import on_main_process

LOCK = ".training.lock"
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MOST_RESERVED = 1 << 26  # bytes


@contextmanager
def hold_output_dir(output_dir: str) -> Iterator[None]:
    """Keep other trainings out of a folder. All ranks call this, before they load anything.

    The main process' lock ends with it, however it ends. It is one of POSIX: those go over NFS, and no child process
    inherits them. A file system without locks is reported, and used all the same. Raises OutputDirError where the
    folder cannot be written, or another training writes to it.
    """
    locks: list[int] = []  # of this process; a descriptor means nothing on another rank
    try:
        on_main_process(_lock, Path(output_dir), locks)
        yield
    finally:
        for lock in locks:
            os.close(lock)


def _lock(folder: Path, locks: list[int]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(lock := os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(lock, 200, 0).decode(errors="replace") or "of an unknown process"
                raise OutputDirError(
                    f"another training writes to output_dir {folder}: {holder}. Two would write over each other's "
                    "checkpoints. Wait until it is done or stop it, or name another output_dir."
                ) from error
            print(f"trl-vpo: {folder} has no file locks ({error.strerror}): make sure that no other run writes there.")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on {platform.node()}".encode(), 0)
        os.fsync(lock)
    except OutputDirError:
        raise
    except OSError as error:
        raise OutputDirError(
            f"output_dir {folder} cannot be written: {error.strerror or error}. {remedy(folder, error)}"
        ) from error


def check_space(output_dir: str, size: int) -> None:
    """Raise OutputDirError if the trained weights, of `size` bytes, would not fit where they are to be saved.

    Quotas show only when space is asked for. It is given back; where asking means writing, it takes seconds at most.
    """
    folder = Path(output_dir)
    try:
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, min(max(size, 1), MOST_RESERVED))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise OutputDirError(
                f"output_dir {folder} has no room for what is trained ({size / 2**20:.1f} MiB): {error.strerror}. "
                f"{remedy(folder, error)}"
            ) from error


def remedy(folder: Path, error: Exception) -> str:
    """Say what to do about a failed write below a folder; errors of torch and safetensors do not tell their cause."""
    number = getattr(error, "errno", None)
    if number is None:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except OSError as problem:
            number = problem.errno
    if number in FORBIDDEN:
        return f"Give user {os.geteuid()} the right to write there (mounted read-only?), or name another output_dir."
    if number not in {None, *NO_SPACE}:
        return "Name another output_dir."
    free = ""
    with suppress(OSError):
        free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there. "
    return f"{free}Free some space on that disk (or its quota), or keep fewer checkpoints with save_total_limit."
