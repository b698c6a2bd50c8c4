"""The process that runs cells: it answers its parent until that hangs up, or kills it because time is over.

A cell that fails is an answer like any other. After an error of CUDA itself the process ends: nothing it does with the
GPU afterwards would work.
"""

import contextlib
import gc
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "triton", "flash-attn", "flash-attn-3")
PACKAGES += ("bitsandbytes", "av")


def serve(connection: Connection, options: Any, log: Path) -> None:
    """Answer (what, part, cell) with (kind, answer); see `_answer`. Whatever is printed goes to the log."""
    _print_to(log)
    tempfile.tempdir = options.scratch
    while True:
        try:
            what, part, cell, measured = connection.recv()
        except EOFError:
            return
        options.measured = measured
        answer, broken = _answer(what, part, cell, options)
        connection.send(answer)
        if broken:
            return


def _print_to(log: Path) -> None:
    stream = log.open("a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream


def _answer(what: str, part: str, cell: Any, options: Any) -> tuple[tuple[str, Any], bool]:
    """("ok", result) of a call of the part's module, or ("missing" | "memory" | "error", a line), and "GPU broken"."""
    try:
        if what == "machine":
            with contextlib.suppress(ImportError):  # the parts say what is missing
                importlib.import_module("gpu_checks.trainers")
            return ("ok", machine(options.device)), False
        module = importlib.import_module(f"gpu_checks.{part}")
        return ("ok", module.cells(options) if what == "cells" else module.run(cell, options)), False
    except ImportError as error:
        problem = "missing", f"not run: {error}"
        traceback.print_exc()
    except Exception as error:
        traceback.print_exc()
        kind = "memory" if _out_of_memory(error) else "error"
        line = str(error).strip().partition("\n")[0][:300]
        problem = kind, "out of memory" if kind == "memory" else f"{type(error).__name__}: {line}"
    # Out of the `except`: until here the error holds all that the cell held.
    gc.collect()
    return problem, problem[0] == "error" and "CUDA" in problem[1]


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def machine(device: str) -> dict[str, str]:
    """Return what the numbers depend on.

    Raises:
        RuntimeError: there is no CUDA GPU.
    """
    import torch

    facts = {"python": platform.python_version()}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no CUDA GPU; --device cpu --tiny is a dry run")
        properties = torch.cuda.get_device_properties(0)
        capability = f"compute capability {properties.major}.{properties.minor}"
        card = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
        facts = {"card": card, "driver": _driver(), "CUDA": str(torch.version.cuda)} | facts
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    else:
        facts = {"card": f"no GPU: {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"} | facts
    return facts | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
