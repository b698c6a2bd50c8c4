"""The signals that stop a training: they reach the training, and not the processes that load its data.

Schedulers send them to every process of a job. A training without its data loaders cannot finish the step that it is
to save. So what loads data ignores these signals; it ends with the process that started it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_start_method, resource_tracker

import psutil
from torch.utils.data import DataLoader

from trl_vpo.training.launch import STOP

LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "trl-vpo"}
LAUNCHERS |= {"accelerate.commands.launch", "torch.distributed.run", "torch.distributed.launch", "trl_vpo.cli"}
LAUNCHERS |= {"deepspeed", "deepspeed.launcher.launch"}


@contextmanager
def keep_from_workers() -> Iterator[None]:
    """Make the data loaders that are begun meanwhile keep their processes through the signals in `STOP`."""
    begin = DataLoader._get_iterator

    def begin_undisturbed(loader: DataLoader):
        if not loader.num_workers:
            return begin(loader)
        if not isinstance(loader.worker_init_fn, _Worker):
            loader.worker_init_fn = _Worker(loader.worker_init_fn)
        if loader.multiprocessing_context is not None or get_start_method() != "fork":
            resource_tracker.ensure_running()  # with its first process it would let the signals through again
        # Processes inherit what is blocked, from their first moment on and through an exec.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        try:
            return begin(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    DataLoader._get_iterator = begin_undisturbed
    try:
        yield
    finally:
        DataLoader._get_iterator = begin


class _Worker:
    """A `worker_init_fn` that still lets the loader end its process, which it does with SIGTERM."""

    def __init__(self, init: Callable[[int], None] | None):
        self._init, self._parent = init, os.getpid()

    def __call__(self, worker_id: int) -> None:
        if os.getppid() != self._parent:  # it died while this one was spawned; torch would wait for it for ever
            os._exit(0)
        if hasattr(signal, "sigwaitinfo"):  # not on macOS
            threading.Thread(target=_end_with_loader, daemon=True).start()
        if self._init is not None:
            self._init(worker_id)


def _end_with_loader() -> None:
    while signal.sigwaitinfo(STOP[:1]).si_pid != os.getppid():
        pass
    os._exit(0)


def end_with_launcher() -> None:
    """Stop this process, as by SIGTERM, once the launcher that started it is gone.

    Otherwise its training would go on beside that of the next start. What a shell started goes on without its shell.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ or _is_launcher(parent):
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _is_launcher(pid: int) -> bool:
    try:
        words = [os.path.basename(word) for word in psutil.Process(pid).cmdline()[:4]]
    except psutil.Error:
        return False
    return bool(LAUNCHERS & set(words)) and (words[0].startswith("python") or words[0] in LAUNCHERS)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
