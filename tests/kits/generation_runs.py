"""`trl-vpo generate` in processes of its own, forked from one that has everything imported, to be interrupted.

{"argv": [...], "log": FILE, "env": {...}} starts the command, its output in the file.
"""

import os
import sys
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from forks import in_forks, run_and_exit, serve
from tqdm import tqdm

torch.set_num_threads(1)  # a fork has none of its parent's threads
tqdm.set_lock(threading.RLock())  # its own is one for all forks: a killed run would keep it


def warm_up(model: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trl_vpo.generate import run  # noqa: F401
    from trl_vpo.models import attach, local, source  # noqa: F401

    AutoProcessor.from_pretrained(model)
    AutoModelForImageTextToText.from_pretrained(model)


def child(job: dict) -> None:
    os.environ.update(job["env"])
    from trl_vpo.cli import main

    run_and_exit(lambda: main(job["argv"]), job["log"])


if __name__ == "__main__":
    serve(in_forks(child), lambda: warm_up(sys.argv[1]))
