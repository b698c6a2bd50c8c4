"""The callback that lets a run be interrupted at any moment and continued exactly."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from trl_vpo.training.changed_rows import FILE, Rows
from trl_vpo.training.checkpoints import best_of, delete_older, list_checkpoints, mark_complete, step_of, why_no_resume
from trl_vpo.training.failed_saves import explain_failed_save
from trl_vpo.training.sigterm import StopRequest

COUNTERS = {  # in the marker: attribute of the trainer
    "loss_sum": "_total_loss_scalar",
    "logged_at": "_globalstep_last_logged",
    "tokens": "_total_train_tokens",
    "new_tokens": "_new_tokens",
}


class NothingLeft(Exception):
    """The checkpoint is of the last step."""


class ResumeCallback(TrainerCallback):
    """Complete checkpoints, restore counters that transformers starts at zero, and save when a signal asks to stop.

    Every marker holds `run`, every checkpoint the digests of `rows`. `checkpoint` with its `marker` is where training
    continues from; checkpoints that `in_use` returns must not be deleted then. `stopped`: a signal ended the training.
    """

    def __init__(self, trainer: Any, run: dict, rows: Rows, checkpoint: Path | None, marker: dict, in_use: Callable):
        self._trainer, self._run, self._rows, self._checkpoint = trainer, run, rows, checkpoint
        self._marker, self._in_use = marker, in_use
        self._limit, self._began_at = trainer.args.save_total_limit, 0
        self._pass = marker.get("pass", [0, 0])  # the number of this pass over the rows, and the step it began after
        self.request, self.stopped = StopRequest(), False

    # --- counters ---------------------------------------------------------------------------------------------------

    def place(self, init_training_state: Callable, *args) -> tuple[int, int]:
        """Return (passes over the rows that are done, micro-batches of this one), where training goes on.

        Those of transformers are wrong for a stream: it takes all `max_steps` for one pass. And it forgets the best
        checkpoint where the folder of a run was moved.
        """
        best, trainer = self._checkpoint and best_of(self._checkpoint), self._trainer
        with _without_warning("The best checkpoint ") if best and best.is_dir() else nullcontext():
            passes, batches = init_training_state(*args)
        if best and best.is_dir():
            trainer.state.best_model_checkpoint = str(best)
        if "pass" in self._marker and not isinstance(trainer.train_dataset, Dataset):
            passes, first = self._pass
            batches = (trainer.state.global_step - first) * trainer.args.gradient_accumulation_steps
        return passes, batches

    def on_train_begin(self, args, state, control, **kwargs):
        """Everything is loaded by now, and transformers has set its counters to zero."""
        trainer, self._began_at = self._trainer, state.global_step
        if self._checkpoint:
            args.eval_on_start = False  # the start is long past
            saved = self._marker["counters"][args.process_index]
            trainer._initial_global_step = 0  # `train_loss` is a mean over all steps, see `on_log`
            trainer._tr_loss += saved["loss"]  # it was zero
            trainer._sums["train"]._sums = saved["sums"]
            trainer._metrics["train"].update(saved["metrics"])
            for name, attribute in COUNTERS.items():
                setattr(trainer, attribute, saved[name])
            _follow_schedule(trainer, json.loads((self._checkpoint / "trainer_state.json").read_bytes())["max_steps"])
            if trainer.scorer.packs is None:  # then it goes on as its rows proved it
                trainer.scorer.layout, trainer.scorer.packs = self._marker["layout"], self._marker.get("packs")
                trainer.scorer.proven = list(self._marker.get("proven", ()))
        self.request.listen()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeft
        args.save_total_limit = None  # `save` deletes; not sooner, so that reporters note the recipe's value

    def on_epoch_end(self, args, state, control, **kwargs):
        if not control.should_training_stop:  # then it is not over
            self._pass = [self._pass[0] + 1, state.global_step]

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Correct the speeds: transformers divides all steps by the time since the run was continued."""
        if self._began_at and "train_loss" in logs:
            share = 1 - self._began_at / state.global_step
            for name in {"train_samples_per_second", "train_steps_per_second"} & set(logs):
                logs[name] = state.log_history[-1][name] = round(logs[name] * share, 3)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, save_checkpoint: Any, *args) -> None:
        """Save a checkpoint, mark it once every process has written its files, and only then delete older ones.

        Raises SaveError where the disk does not take it.
        """
        trainer, state = self._trainer, self._trainer.state
        folder = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
        with explain_failed_save(trainer, folder):
            save_checkpoint(*args)
            sums = {  # of this rank, since the last log line and of the whole run
                "loss": trainer._tr_loss.item(),
                "sums": trainer._sums["train"]._sums,
                "metrics": {name: [float(v) for v in values] for name, values in trainer._metrics["train"].items()},
                **{name: getattr(trainer, attribute) for name, attribute in COUNTERS.items()},
            }
            counters = gather_object([sums])
            if not trainer.args.should_save:
                return
            if self._rows.digests is not None:
                np.save(folder / FILE, self._rows.digests)
            what = {"step": state.global_step, "run": self._run, "gone": self._rows.removed, "counters": counters}
            what |= {"pass": self._pass, "no_resume": why_no_resume(trainer.args)}
            scorer = trainer.scorer
            mark_complete(folder, layout=scorer.layout, packs=scorer.packs, proven=scorer.proven, **what)
        best = state.best_model_checkpoint
        delete_older(trainer.args.output_dir, self._limit, folder, best=best, in_use=self._in_use())

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._limit
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best and not self.stopped and Path(best).is_dir() and args.should_save and self._limit == 1:
            for folder in list_checkpoints(args.output_dir):  # as transformers does: nobody needs the last any more
                others = step_of(folder) <= state.global_step and folder.name != Path(best).name
                if others and folder not in self._in_use():
                    shutil.rmtree(folder, ignore_errors=True)

    # --- signals ----------------------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, **kwargs):
        """The ordinary save at the end of a step, on all ranks together once one of them was asked to stop."""
        if self.request.reached_any_rank(self._trainer.accelerator) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def _without_warning(start: str) -> Iterator[None]:
    """Drop warnings of transformers' trainer that begin with this."""
    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(drop := lambda record: not record.getMessage().startswith(start))
    try:
        yield
    finally:
        logger.removeFilter(drop)


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
