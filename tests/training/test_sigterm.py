"""Who gets the signals that stop a training: real processes of real data loaders, and command lines of launchers."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from trl_vpo.training.sigterm import _is_launcher, shield_data_workers


class Pids(Dataset):
    """Each item is the process that loads it, and whether the `worker_init_fn` ran there."""

    ready = False

    def __len__(self):
        return 200

    def __getitem__(self, index):
        return os.getpid(), type(self).ready


def set_ready(worker_id):
    Pids.ready = True


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_outlive_the_signal_and_end_with_their_loader(context):
    loader = DataLoader(Pids(), num_workers=1, worker_init_fn=set_ready, multiprocessing_context=context)
    with shield_data_workers():
        items = iter(loader)
        (worker,) = items._workers
        for number in ("TERM", "USR1"):
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)  # also before it has begun
        assert [int(next(items)[0]) for _ in range(3)] == [worker.pid] * 3
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        pid, ready = next(items)
        assert int(pid) == worker.pid and bool(ready)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # here they still get through
        os.kill(worker.pid, signal.SIGSTOP)  # too busy to take the signals one by one
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        worker.terminate()
        os.kill(worker.pid, signal.SIGCONT)
        worker.join(30)
    assert worker.exitcode == 0
    del items


def test_signals_come_also_while_python_exits():
    code = (
        "import os, signal\n"
        "from trl_vpo.training.sigterm import StopRequest\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGTERM):\n"
        "        kill(own, number)\n"
        "late, request = Late(), StopRequest()\n"
        "request.listen()\n"
        "request.ignore()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace("ignore", "forget")], timeout=120).returncode == -15


def test_a_process_that_exits_ends_its_workers():
    """Also where the loader is still in use, and the workers are past being asked."""
    code = (
        "import os, signal\n"
        "from torch.utils.data import DataLoader\n"
        "from trl_vpo.training.sigterm import shield_data_workers\n"
        "with shield_data_workers():\n"
        "    items = iter(DataLoader(range(200), num_workers=1))\n"
        "next(items)\n"
        "os.kill(items._workers[0].pid, signal.SIGTERM)\n"
        "print('done')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_a_worker_whose_parent_is_gone_ends():
    """Also where it was gone before the worker began: torch looks for a change only."""
    code = "from trl_vpo.training.sigterm import _Worker; _Worker(None)(0); print('goes on')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ([sys.executable, "-c", "input()", "torchrun"], True),
        ([sys.executable, "-c", "input()", "/env/bin/accelerate"], True),
        ([sys.executable, "-c", "input()", "train.py"], False),
        (["bash", "-c", "read line; true", "trl-vpo"], False),  # a shell may go and leave the training
    ],
)
def test_what_counts_as_a_launcher(command, launches):
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    until = time.monotonic() + 10
    while psutil.Process(process.pid).cmdline()[-1:] != command[-1:] and time.monotonic() < until:
        time.sleep(0.01)
    assert _is_launcher(process.pid) == launches
    process.communicate(b"\n")
    assert not _is_launcher(process.pid)
