"""`trl-vpo generate` in processes of its own, forked from one that has everything imported, to be interrupted.

Reads a job as JSON from each line of stdin. {"argv": [...], "log": FILE, "env": {...}}: starts the command, its output
in the file, and prints its pid. {"wait": pid}: waits for it and prints its exit status, negative for a signal.
"""

import os
import sys
import threading
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tqdm import tqdm
from workers import serve

torch.set_num_threads(1)  # a fork has none of its parent's threads
tqdm.set_lock(threading.RLock())  # its own is one for all forks: a killed run would keep it


def warm_up(model: str) -> None:
    """Import what a run imports, some of it only when a model is loaded."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trl_vpo.generate import run  # noqa: F401
    from trl_vpo.models import attach, local, source  # noqa: F401

    AutoProcessor.from_pretrained(model)
    AutoModelForImageTextToText.from_pretrained(model)


def child(job: dict) -> None:
    """The command, in a process of its own."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("env", {}))
    from trl_vpo.cli import main

    status = 3
    try:
        status = main(job["argv"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    warm_up(sys.argv[1])
    print("ready", flush=True)
    serve(child)
