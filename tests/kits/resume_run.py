"""Runs of `run_training` that can be killed at any moment, started by resume_runs.py: importing TRL once is enough.

It does one job after the other, in processes of their own, and says how they ended:
    {"method": "rrpo", "argv": [...], "output_dir": FOLDER, "log": FILE, "processes": 1, "rank": 0, "kill": null,
     "file_limit": null, "env": {}}  ->  [exit code of each process]
`kill` is how the run ends:
    ["seconds", 0.7]         SIGKILL after so long
    ["file", PATH]           SIGKILL as soon as this file is there
    ["SIGKILL", 12, "checkpoint-4"]  before the 12th change that Python code makes to this folder; "": to any of them
    ["SIGTERM", 12, ""]      the same; SIGINT is Ctrl-C
With several processes, the one with number `rank` counts, and all are killed when one was. `file_limit` is in bytes.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from forks import run_and_exit, serve

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def import_everything():
    import torch
    import transformers.models.llava_onevision.modeling_llava_onevision
    import trl.kernels.chunked_divergence
    import trl.scripts.utils

    from trl_vpo.training.methods import METHODS, method_classes

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401 - accelerate looks for it and imports it
    for method in METHODS:
        method_classes(method)
    assert transformers and trl
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # every process would look through all of it again


def watch_changes(act, output_dir, folder):
    """Call `act(n)` before the n-th change to a folder of a run, or to any `checkpoint-N`."""
    count, prefix = 0, str(Path(output_dir) / (folder or "checkpoint-"))

    def hook(event, args):
        nonlocal count
        if event == "open":
            path, _, flags = args
            changes = isinstance(path, str) and bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        else:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if changes and str(args[0]).startswith(prefix):
            count += 1
            act(count)

    sys.addaudithook(hook)


def record_order(log):
    """Write which rows each step is computed on."""
    from trl_vpo.trainers.base import VisualPreferenceTrainer

    compute_loss = VisualPreferenceTrainer.compute_loss

    def recorded(self, model, inputs, **kwargs):
        if self.model.training:
            entry = {"rank": self.args.process_index, "step": self.state.global_step, "names": inputs["names"]}
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
        return compute_loss(self, model, inputs, **kwargs)

    VisualPreferenceTrainer.compute_loss = recorded


def set_date(day):
    """Let chat templates find another day of December."""
    import transformers.utils.chat_template_utils as templates

    class Fixed(templates.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 12, day)

    templates.datetime = Fixed


def train(job, rank, port):
    from trl_vpo.training.run import run_training

    if "DAY" in job["env"]:
        set_date(int(job["env"]["DAY"]))
    if job["processes"] > 1:
        size = str(job["processes"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= job["env"]
    record_order(job["log"])
    kind, *at = job["kill"] or [""]
    if kind.startswith("SIG") and rank == job["rank"]:
        number, (when, folder) = getattr(signal, kind), at
        watch_changes(lambda n: n == when and os.kill(os.getpid(), number), job["output_dir"], folder)
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
    run_training(job["method"], job["argv"])


def run(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind, at, *_ = job["kill"] or ("", 0)
    deadline = time.monotonic() + (at if kind == "seconds" else 120)
    pids = []
    for rank in range(job["processes"]):
        pids.append(os.fork())
        if not pids[-1]:
            run_and_exit(lambda rank=rank: train(job, rank, port), f"{job['log']}.{rank}.txt")
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        failed = pid and codes[pid] not in (0, 128 + signal.SIGTERM)
        if failed or time.monotonic() > deadline or (kind == "file" and os.path.exists(at)):
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
        time.sleep(0.0005)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve(run, import_everything)
