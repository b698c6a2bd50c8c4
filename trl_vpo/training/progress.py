"""The progress of training: a bar on a terminal, one short line for each logging step in a log file."""

from __future__ import annotations

import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from trl_vpo.runs.console import fit

GIB = 2**30
SHOWN = (  # key in the logs, what it is called here, how it is written
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", "+.3f"),
    ("rewards/accuracies", "acc", ".2f"),
    ("grad_norm", "grad", ".3g"),
    ("learning_rate", "lr", ".2e"),
)
DROPPED = ("lr", "grad", "epoch", "peak", "acc", "speed", "margin")  # from a line that is too long, the first first
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


def show_progress(trainer: Any, start: Mapping[str, str] = MappingProxyType({})) -> None:
    """Replace transformers' own progress; another callback in its place, as in a notebook, stays.

    `start`: what is printed when training starts, besides the steps, as name -> text.
    """
    if any(map(trainer.pop_callback, (ProgressCallback, PrinterCallback))):
        trainer.add_callback(TrainingProgress(start, getattr(trainer, "scorer", None)))


class TrainingProgress(ProgressCallback):
    """Print the progress on rank 0: on a terminal one bar with loss, margin, tokens per second and peak memory.

    Where standard output is not a terminal, and with `disable_tqdm`, a line for each logging step goes there.
    Evaluations and the summary at the end are always lines. Tokens per second are those of `num_tokens`, of all ranks,
    without the time of evaluations and checkpoints.
    """

    def __init__(self, start: Mapping[str, str] = MappingProxyType({}), scorer: Any = None):
        super().__init__()
        self._start, self._scorer = start, scorer

    # --- events -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if self._start:
            done = f", {state.global_step} of them done" if state.global_step else ""
            epochs = ""
            if has_length(train_dataloader):
                count = state.max_steps / math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
                epochs = f" ({count:.3g} epoch{'' if count == 1 else 's'})"
            lines = self._start | {"steps": f"{state.max_steps}{epochs}{done}"}
            self._write("\n".join(f"{name:<12}{text}" for name, text in lines.items()))
        self.current_step = state.global_step
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format=BAR,
            dynamic_ncols=True,
            disable=True if args.disable_tqdm else None,  # None: where standard error is no terminal
        )
        self._lines = self.training_bar.disable or not sys.stdout.isatty()
        self._logged = self._mark = time.monotonic()
        self._elsewhere = 0.0  # seconds of evaluations and checkpoints since the last logging step
        # A checkpoint may lie between two logging steps: how many tokens came before it is not known.
        self._tokens = 0 if state.global_step == 0 else None

    def on_step_end(self, args, state, control, **kwargs):
        self._mark = time.monotonic()
        super().on_step_end(args, state, control, **kwargs)
        if self._start and self._scorer and self._scorer.proven and state.is_world_process_zero:
            self._write(f"{'proven':<12}{self._scorer}")
            self._start = {}

    def on_save(self, args, state, control, **kwargs):
        """Count the time since the step ended, or since the last such pause, as none of training."""
        if self.training_bar is not None:
            now = time.monotonic()
            self._elsewhere, self._mark = self._elsewhere + now - self._mark, now

    def on_prediction_step(self, args, state, control, **kwargs):
        if sys.stderr.isatty() and not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self.on_save(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            self._show_step(args, step, logs)
        if "train_runtime" in logs:  # with the averages of steps that were not logged yet
            self._write(_summary(state, logs))
        elif "loss" in logs:
            return
        elif prefixes := [key.removesuffix("loss") for key in logs if key.endswith("_loss")]:
            for prefix in prefixes:
                self._write(_evaluation(step, logs, prefix))
        else:
            values = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items())
            self._write("  ".join([step, *values]))

    # --- what they print --------------------------------------------------------------------------------------------

    def _show_step(self, args: Any, step: str, logs: dict[str, float]) -> None:
        speed, memory = self._tokens_per_second(logs), peak_memory(args.device)
        parts = {"step": step} | ({"epoch": f"epoch {logs['epoch']:.2f}"} if "epoch" in logs else {})
        parts |= {name: f"{name} {logs[key]:{form}}" for key, name, form in SHOWN if key in logs}
        parts |= {"speed": f"{speed:,.0f} tok/s"} if speed is not None else {}
        parts |= {"peak": f"peak {memory / GIB:.1f} GiB"} if memory is not None else {}
        bar = self.training_bar
        if bar is not None and not bar.disable:
            taken = len(f"100%|{'#' * 8}| {bar.total}/{bar.total} 0:00:00<0:00:00, ")
            beside = {name: text for name, text in parts.items() if name in ("loss", "margin", "speed", "peak")}
            bar.set_postfix_str(fit(beside, DROPPED, shutil.get_terminal_size().columns - taken))
        if bar is None or self._lines:
            self._write(fit(parts, DROPPED))

    def _tokens_per_second(self, logs: dict[str, float]) -> float | None:
        """The speed since the last logging step; None where tokens are not counted or not known."""
        now, tokens, before = time.monotonic(), logs.get("num_tokens"), self._tokens
        seconds = now - self._logged - self._elsewhere
        self._tokens, self._logged, self._mark, self._elsewhere = tokens, now, now, 0.0
        return (tokens - before) / seconds if tokens is not None and before is not None and seconds > 0 else None

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _evaluation(step: str, logs: dict[str, float], prefix: str) -> str:
    """`prefix`: `eval_`, or `eval_NAME_` where there are several sets."""
    name = prefix.removeprefix("eval_").removesuffix("_")
    parts = {"name": f"evaluation{f' of {name}' if name else ''}:"}
    parts |= {word: f"{word} {logs[prefix + key]:{form}}" for key, word, form in SHOWN if prefix + key in logs}
    parts |= {"speed": f"{logs[prefix + 'runtime']:.1f} s"} if prefix + "runtime" in logs else {}
    return fit({"step": step} | parts, DROPPED)


def _summary(state: Any, logs: dict[str, float]) -> str:
    words = [f"trained to step {state.global_step} in {logs['train_runtime']:.1f} s"]
    if "train_samples_per_second" in logs:
        words.append(f"{logs['train_samples_per_second']:.2f} rows/s")
    return ", ".join([*words, f"mean loss {logs['train_loss']:.4f}"] if "train_loss" in logs else words)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes this process has held: in tensors on a GPU, or in all on the CPU; None for other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB elsewhere
