"""SIGTERM: the training stops at the end of its step, saved. SIGUSR1 does the same.

Schedulers send them to every process of a job:
- the training notes it (`StopRequest`); `resume_callback.py` saves after the step, on all ranks together;
- the processes that load its data ignore it (`shield_data_workers`): without them the step could not be finished;
- `trl-vpo train` with a launcher passes it on (`launch.py`); where a launcher is killed, its training gets a SIGTERM
  of its own (`end_with_launcher`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_start_method, parent_process, resource_tracker
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

STOPPED = 128 + signal.SIGTERM  # exit code
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends USR1 ahead of the end: `--signal=USR1@60`
END_WORKER = getattr(signal, "SIGRTMIN", signal.SIGUSR2)  # macOS has no SIGRTMIN
LAUNCHERS = {
    "accelerate", "accelerate-launch", "torchrun", "trl-vpo", "deepspeed", "accelerate.commands.launch",
    "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch", "trl_vpo", "trl_vpo.cli",
}  # fmt: skip


class TrainingStopped(SystemExit):
    """A signal asked to stop, and a checkpoint was saved. The exit code is 143, as of a process that SIGTERM ended."""

    def __init__(self):
        super().__init__(STOPPED)


class StopRequest:
    """A request to stop, by one of `STOP_SIGNALS`."""

    def __init__(self):
        self.name = ""  # of the signal that came
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Note the signals from now on, in place of ending the process."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number, frame) -> None:
        self.name = signal.Signals(number).name

    def reached_any_rank(self, accelerator: Any) -> bool:
        """Return whether a signal came to any rank. All ranks call this."""
        if accelerator.num_processes > 1:
            asked = torch.tensor(int(bool(self.name)), device=accelerator.device)
            if accelerator.reduce(asked, reduction="sum"):
                self.name = self.name or signal.SIGTERM.name
        return bool(self.name)

    def forget(self) -> None:
        """Let the signals end the process again, as before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Let the signals do nothing while the process ends: they are often sent again, and Python drops handlers."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)


# --- processes that load data ---------------------------------------------------------------------------------------


@contextmanager
def shield_data_workers() -> Iterator[None]:
    """Keep `STOP_SIGNALS` from the processes of the data loaders that are started meanwhile."""
    start = DataLoader._get_iterator

    def start_shielded(loader: DataLoader):
        if not loader.num_workers:
            return start(loader)
        if not isinstance(loader.worker_init_fn, _Worker):
            loader.worker_init_fn = _Worker(loader.worker_init_fn)
        if loader.multiprocessing_context is not None or get_start_method() != "fork":
            resource_tracker.ensure_running()  # with its first process it would let the signals through again
        # Processes inherit what is blocked, from their first moment on and through an exec.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, END_WORKER))
        try:
            batches = start(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in batches._workers:  # their `terminate`, and the end of this process, send SIGTERM otherwise
            worker._popen.terminate = partial(worker._popen._send_signal, END_WORKER)
        return batches

    DataLoader._get_iterator = start_shielded
    try:
        yield
    finally:
        DataLoader._get_iterator = start


class _Worker:
    """A `worker_init_fn` that lets the loader end its process, by a signal of their own.

    A SIGTERM of the loader could not be told from one of the scheduler: a second one that comes before the first was
    taken is dropped.
    """

    def __init__(self, init: Callable[[int], None] | None):
        self._init = init

    def __call__(self, worker_id: int) -> None:
        parent = parent_process()  # not `os.getppid`, which may be the fork server
        if parent is None or not parent.is_alive():  # it died while this one was spawned; torch would wait for ever
            os._exit(0)
        threading.Thread(target=self._end_with_loader, daemon=True).start()
        if self._init is not None:
            self._init(worker_id)

    def _end_with_loader(self) -> None:
        signal.sigwait([END_WORKER])
        os._exit(0)


# --- launchers that are killed --------------------------------------------------------------------------------------


def end_with_launcher() -> None:
    """Stop this process, as by SIGTERM, once the launcher that started it has ended.

    Otherwise its training would continue beside that of the next start. What a shell started outlives its shell.
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
