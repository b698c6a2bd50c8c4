"""Going on after an interruption as if there had been none: the same weights, the same logs, the same order of data.

`transformers` restores weights, optimizer, scheduler, random numbers and the place in the data. Added here: only whole
checkpoints count (`training/checkpoints.py`), another run's are refused, counters that would start at zero go on,
SIGTERM saves at the end of the step, and a full disk is told with what is left.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback

from trl_vpo.errors import CheckpointError, MediaError, RowError
from trl_vpo.training import checkpoints
from trl_vpo.training.changed_rows import FILE, RemainingRows, Rows, compare_rows, read_rows, trained_rows
from trl_vpo.training.checkpoints import what_is_left
from trl_vpo.training.failed_saves import explain_failed_saves
from trl_vpo.training.launch import STOP
from trl_vpo.training.output_dir import check_space
from trl_vpo.training.run_identity import compare_runs
from trl_vpo.training.signals import keep_from_workers


class TrainingStopped(SystemExit):
    """A signal asked to stop, and a checkpoint was saved. The exit code is 143, as of a process that SIGTERM ended."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class _NothingLeft(Exception):
    """The checkpoint is of the last step."""


def say(message: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(f"trl-vpo: {message}", flush=True)


def find_checkpoint(args: Any) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: `true` the newest whole one, or a path. All ranks call this.

    None: training starts from scratch; the reason is printed where there is one.

    Raises:
        CheckpointError: it cannot be gone on from.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = _find(args)
        except CheckpointError as error:  # for all ranks: the others would wait
            found[1] = str(error)
    path, error = broadcast_object_list(found)
    if error:
        raise CheckpointError(error)
    return path


def _find(args: Any) -> Path | None:
    wanted, folders = str(args.resume_from_checkpoint), checkpoints.list_checkpoints(args.output_dir)
    if wanted.lower() in ("none", "false", ""):
        if folders:
            say(
                f"{args.output_dir} has checkpoints of an earlier run, the last one {folders[0].name}. This run "
                "starts from scratch and writes over them. --resume_from_checkpoint true goes on from there instead."
            )
        return None
    if wanted.lower() == "true":
        found = checkpoints.newest_complete(args.output_dir, say)
        if found is None:
            say(f"{args.output_dir} has no complete checkpoint: training starts from scratch.")
        return found
    problems = checkpoints.find_problems(Path(wanted))
    if problems:
        raise CheckpointError(
            f"resume_from_checkpoint: training cannot go on from {wanted}: {'; '.join(problems)}. Name another one, "
            "or true for the newest that is complete."
        )
    return Path(wanted)


def train(trainer: Any, checkpoint: Path | None, run: dict, digests: Any = None) -> Any:
    """`trainer.train()` from a checkpoint, or from the start. Gives its `TrainOutput`. All ranks call this.

    Args:
        trainer: before training.
        checkpoint: from `find_checkpoint`.
        run: what the run is, from `trl_vpo.training.run_identity.describe_run`; kept in each checkpoint.
        digests: of its rows, from `trl_vpo.runs.digests.row_digests`; kept, too. Only the main process needs them.

    Raises:
        CheckpointError: the checkpoint is another run's. Names each difference.
        OutputDirError: the result would not fit on its disk.
        failed_saves.SaveError: a checkpoint could not be written.
        TrainingStopped: SIGTERM came.
    """
    trained = (p for p in trainer.model.parameters() if p.requires_grad)
    check_space(trainer.args, sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trained))  # of ZeRO-3
    rows, marker = Rows(digests), None
    if checkpoint:
        rows, marker = _check_same_run(checkpoint, run, digests, trainer.args)
    if rows.gone and trainer.args.train_sampling_strategy != "sequential":
        trainer._get_train_sampler = lambda dataset=None: RemainingRows(trainer.args, rows)
    guard = Guard(trainer, run, rows, checkpoint=checkpoint, marker=marker)
    trainer.callback_handler.callbacks.insert(0, guard)  # the first: reporters see the logs as it puts them right
    try:
        with explain_failed_saves(trainer), checkpoints.explain_failed_loads(checkpoint), keep_from_workers():
            result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except _NothingLeft:
        # Another `train` would take one more step: transformers looks at the number of steps after each one.
        result = trainer._finalize_training(None, 0, time.time())
    except KeyboardInterrupt:
        say(f"interrupted after step {trainer.state.global_step}. {what_is_left(trainer.args.output_dir)}")
        raise
    except (RowError, MediaError):
        say(f"stopped after step {trainer.state.global_step}. {what_is_left(trainer.args.output_dir)}")
        raise
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        what = str(error).splitlines()[0].strip().rstrip(".")
        raise ChildProcessError(
            f"{what}, after step {trainer.state.global_step}. It loads rows; most often the machine or the container "
            "had no more memory (`dmesg` says so). Lower dataloader_num_workers or dataloader_prefetch_factor. "
            f"{what_is_left(trainer.args.output_dir)}"
        ) from error
    finally:
        guard.restore_signals()
    if guard.stopped:
        trainer.accelerator.wait_for_everyone()  # a launcher gives the others little time once one has ended
        say(f"{guard.asked}: stopped after step {trainer.state.global_step} of {trainer.state.max_steps}. "
            f"{what_is_left(trainer.args.output_dir)}")  # fmt: skip
        raise TrainingStopped
    return result


def _check_same_run(checkpoint: Path, run: dict, digests: Any, args: Any) -> tuple[Rows, dict]:
    """The rows of the rest of the run, and the checkpoint's marker. All ranks call this.

    Says what may differ and does, refuses what may not.
    """
    marker = checkpoints.read_marker(checkpoint)
    rows, refused, changed = Rows(digests), [], []
    if PartialState().is_main_process:
        saved = read_rows(checkpoint, marker.get("gone", []))
        known = saved is not None and digests is not None
        earlier = "model files" not in marker["run"]  # an earlier version's: what is not known is not refused
        refused, changed = compare_runs(marker["run"], run, same_rows=known or earlier)
        if known:
            rows, bad, note = compare_rows(saved, digests, trained_rows(args, saved, checkpoints.step_of(checkpoint)))
            refused += [bad] if bad else []
            if note and rows.gone != saved.gone and args.max_steps <= 0:
                note += " The number of steps and the schedule of the learning rate are those of the rows left."
            changed += [note] if note else []
    rows, refused = broadcast_object_list([rows, refused])
    if refused:
        raise CheckpointError(
            f"{checkpoint} is of another run, and going on from it would give a result that no run gives:"
            + "".join(f"\n  - {line}" for line in refused)
            + "\nGive the same recipe and data, or name another output_dir to start a new run."
        )
    although = ", although" + "".join(f"\n  - {line}" for line in changed) if changed else "."
    say(f"Going on from {checkpoint}{although}")
    return rows, marker


class Guard(TrainerCallback):
    """What a run needs to be interrupted at any moment.

    Args:
        trainer: the trainer that it is a callback of.
        run: what the run is; every marker holds it.
        rows: that it trains on; every checkpoint holds their hashes.
        checkpoint: that training goes on from.
        marker: of that checkpoint, if it has one.
    """

    def __init__(self, trainer: Any, run: dict, rows: Rows, *, checkpoint: Path | None, marker: dict | None):
        self._trainer, self._run, self._rows, self._checkpoint = trainer, run, rows, checkpoint
        self._marker = marker or {}
        goes_on = checkpoint and str(trainer.args.resume_from_checkpoint).lower() == "true"  # a path: a new attempt
        self._attempt = checkpoints.next_attempt(trainer.args.output_dir) - bool(goes_on)
        self._limit, self._began_at = trainer.args.save_total_limit, 0
        self.asked, self._signals_before, self.stopped = "", {}, False  # asked: the name of the signal

    # --- counters -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Everything is loaded by now, and transformers has set its counters to zero."""
        trainer = self._trainer
        self._began_at = state.global_step
        if self._checkpoint:
            trainer._initial_global_step = 0  # `train_loss` is a mean over all steps, see `on_log`
            ranks = self._marker["counters"]
            _set_counters(trainer, ranks[args.process_index])
            _follow_schedule(trainer, json.loads((self._checkpoint / "trainer_state.json").read_bytes())["max_steps"])
            if trainer.scorer.layout == "auto" and self._marker.get("layout") in ("shared", "separate"):
                trainer.scorer.layout = self._marker["layout"]  # as the first batch proved it
        if threading.current_thread() is threading.main_thread():
            self._signals_before = {number: signal.signal(number, self._ask) for number in STOP}

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise _NothingLeft
        args.save_total_limit = None  # `on_save` deletes; not sooner, so that reporters note the recipe's value

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Speeds are of the steps since the run was continued, not of all steps in that time."""
        if self._began_at and "train_loss" in logs:
            share = 1 - self._began_at / state.global_step
            for name in {"train_samples_per_second", "train_steps_per_second"} & set(logs):
                logs[name] = state.log_history[-1][name] = round(logs[name] * share, 3)

    # --- saving ---------------------------------------------------------------------------------------------------

    def on_save(self, args, state, control, **kwargs):
        """Mark the checkpoint once every process has written its files; only then delete older ones."""
        counters = gather_object([_counters(self._trainer)])
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._rows.digests is not None:
            np.save(folder / FILE, self._rows.digests)
        checkpoints.mark_complete(
            folder, step=state.global_step, attempt=self._attempt, run=self._run, gone=self._rows.gone,
            layout=self._trainer.scorer.layout, counters=counters,
        )  # fmt: skip
        checkpoints.delete_older(args.output_dir, self._limit, folder, state.best_model_checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._limit
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if not best or self.stopped or not Path(best).is_dir():
            return
        if args.should_save and self._limit == 1:  # as transformers does: nobody needs the last one any more
            for folder in checkpoints.list_checkpoints(args.output_dir):
                if folder.name != Path(best).name and checkpoints.step_of(folder) <= state.global_step:
                    shutil.rmtree(folder, ignore_errors=True)

    # --- SIGTERM --------------------------------------------------------------------------------------------------

    def _ask(self, number, frame):
        self.asked = signal.Signals(number).name

    def on_step_end(self, args, state, control, **kwargs):
        """The ordinary save at the end of a step, on all ranks together once one of them was asked to stop."""
        asked = bool(self.asked)
        if args.world_size > 1:
            flag = torch.tensor(int(asked), device=args.device)
            asked = bool(self._trainer.accelerator.reduce(flag, reduction="sum"))
        if asked and state.global_step < state.max_steps:
            self.asked = self.asked or "SIGTERM"  # another rank was
            self.stopped = control.should_save = control.should_training_stop = True

    def restore_signals(self) -> None:
        """The signals end the process again, as before; not while it ends anyway, when they are often sent again."""
        if not self.stopped:
            for number, before in self._signals_before.items():
                signal.signal(number, before)


def _follow_schedule(trainer: Any, steps: int) -> None:
    """Take the learning rate of the next step from the schedule, where its length is no longer that of `steps`.

    The saved rate is that of the old schedule: zero at its end.
    """
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate may wrap it
    if steps == trainer.state.max_steps or not hasattr(scheduler, "lr_lambdas"):
        return
    rates = [base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group["lr"] = rate
    scheduler._last_lr = rates


def _counters(trainer: Any) -> dict:
    """This rank's sums since the last log line, and of the whole run."""
    return {
        "loss": trainer._tr_loss.item(),
        "loss_sum": trainer._total_loss_scalar,
        "logged_at": trainer._globalstep_last_logged,
        "tokens": trainer._total_train_tokens,
        "new_tokens": trainer._new_tokens,
        "sums": trainer._sums["train"]._sums,
        "metrics": {name: [float(v) for v in values] for name, values in trainer._metrics["train"].items()},
    }


def _set_counters(trainer: Any, saved: dict) -> None:
    trainer._tr_loss += saved["loss"]  # it was zero
    trainer._total_loss_scalar = saved["loss_sum"]
    trainer._globalstep_last_logged = saved["logged_at"]
    trainer._total_train_tokens = saved["tokens"]
    trainer._new_tokens = saved["new_tokens"]
    trainer._sums["train"]._sums = saved["sums"]
    trainer._metrics["train"].update(saved.get("metrics", {}))  # none: an older checkpoint
