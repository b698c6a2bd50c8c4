"""Continuing after an interruption as if there had been none: the same weights, logs, and order of data.

`transformers` restores weights, optimizer, scheduler, random numbers and the place in the data. Added here: only
complete checkpoints count (`checkpoints.py`), those of another run are refused (`run_identity.py`), counters continue
that would start at zero, SIGTERM saves at the end of the step (`resume_callback.py`), and a full disk is reported with
what is left (`failed_saves.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from trl_vpo.errors import CheckpointError, MediaError, RowError, UserError, as_user_errors
from trl_vpo.training import checkpoints
from trl_vpo.training.changed_rows import FILE, RemainingRows, Rows, compare_rows, trained_rows
from trl_vpo.training.checkpoints import what_is_left
from trl_vpo.training.main_process import on_main_process, print_main
from trl_vpo.training.output_dir import check_space
from trl_vpo.training.resume_callback import NothingLeft, ResumeCallback
from trl_vpo.training.run_identity import compare_runs, evaluates_on_others
from trl_vpo.training.sigterm import TrainingStopped, shield_data_workers


def find_checkpoint(args: Any) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` means: for `true` the newest complete one, or a path.

    None: training starts from scratch; the reason is printed where there is one. Raises CheckpointError where training
    cannot continue from it.
    """
    name, output_dir, why = str(args.resume_from_checkpoint), args.output_dir, checkpoints.why_no_resume(args)
    if name.lower() in ("none", "false", ""):
        if folders := checkpoints.list_checkpoints(output_dir):
            instead = "" if why else " --resume_from_checkpoint true continues from there instead."
            print_main(
                f"{output_dir} has checkpoints of an earlier run, the last one {folders[0].name}. This run starts "
                f"from scratch and writes over them.{instead}"
            )
        _warn_of_result(output_dir)
        return None
    if why:
        raise CheckpointError(
            f"resume_from_checkpoint: training cannot continue from a checkpoint of this run: {why}. Leave "
            f"{why.split()[0]} out, or resume_from_checkpoint: then an interrupted run starts anew."
        )
    if name.lower() == "true":
        newest = checkpoints.newest_complete(output_dir)
        if newest is None:
            print_main(f"{output_dir} has no complete checkpoint: training starts from scratch.")
            _warn_of_result(output_dir)
        return newest
    if problems := checkpoints.find_problems(Path(name)):
        raise CheckpointError(
            f"resume_from_checkpoint: training cannot continue from {name}: {'; '.join(problems)}. Name another one, "
            "or true for the newest that is complete."
        )
    return Path(name)


def _warn_of_result(output_dir: str) -> None:
    """Say whose result a training from scratch writes over."""
    try:
        earlier = json.loads((Path(output_dir) / "run.json").read_bytes())["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    print_main(f"{output_dir} holds the result of an earlier run ({earlier}). This run writes over it at its end.")


def earlier_parts(checkpoint: Path, run: dict, output_dir: str) -> list[Path]:
    """Return the checkpoints in a folder that a run left until this one, oldest first."""
    last, parts = checkpoints.step_of(checkpoint), []
    for folder in reversed(checkpoints.list_checkpoints(output_dir)):
        marker = checkpoints.read_marker(folder) if checkpoints.step_of(folder) <= last else None
        if marker and not compare_runs(marker["run"], run, same_rows=True)[0]:
            parts.append(folder)
    return parts


def train(
    trainer: Any,
    checkpoint: Path | None,
    run: dict,
    digests: Any = None,
    *,
    in_use: Callable[[], Collection[Path]] = tuple,
    left: Callable[[str], str] = what_is_left,
) -> Any:
    """Run `trainer.train()` from a checkpoint, or from the start. Returns its `TrainOutput`. All ranks call this.

    Each checkpoint keeps `run` (from `describe_run`) and the `digests` of its rows (from `digest_rows`, on the main
    process). Checkpoints that `in_use` returns after a save are not deleted. `left` says how to go on after
    an interruption. Raises CheckpointError for the checkpoint of another run, naming each difference; OutputDirError
    where the result would not fit on its disk; SaveError; and TrainingStopped after SIGTERM.
    """
    trained = (p for p in trainer.model.parameters() if p.requires_grad)
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trained)  # ds_numel: of ZeRO-3
    on_main_process(check_space, trainer.args.output_dir, size)
    rows, marker = Rows(digests), {}
    if checkpoint:
        marker = checkpoints.read_marker(checkpoint)
        rows = on_main_process(_check_same_run, checkpoint, marker, run, digests, trainer.args)
    if (
        rows.removed
        and isinstance(trainer.train_dataset, Dataset)
        and trainer.args.train_sampling_strategy != "sequential"
    ):
        trainer._get_train_sampler = lambda dataset=None: RemainingRows(trainer.args, rows)
    callback = ResumeCallback(trainer, run, rows, checkpoint, marker, in_use)
    trainer.callback_handler.callbacks.insert(0, callback)  # the first: reporters see the logs as it corrects them
    save, init = trainer._save_checkpoint, trainer._init_training_state
    trainer._save_checkpoint = lambda *args: callback.save(save, *args)
    trainer._init_training_state = lambda *args: callback.place(init, *args)
    try:
        with shield_data_workers(), _explain(trainer, left):
            result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except NothingLeft:
        # Another `train` would take one more step: transformers looks at the number of steps after each one.
        result = trainer._finalize_training(None, 0, time.time())
    finally:
        callback.request.ignore() if callback.stopped else callback.request.forget()
    if callback.stopped:
        trainer.accelerator.wait_for_everyone()  # a launcher gives the others little time once one has ended
        print_main(
            f"{callback.request.name}: stopped after step {trainer.state.global_step} of {trainer.state.max_steps}. "
            f"{left(trainer.args.output_dir)}"
        )
        raise TrainingStopped
    return result


@contextmanager
def _explain(trainer: Any, left: Callable[[str], str]) -> Iterator[None]:
    """Say what is left where a training ends early, and turn the errors of libraries into `UserError`."""
    try:
        with as_user_errors():
            yield
    except (KeyboardInterrupt, RowError, MediaError):
        print_main(f"interrupted after step {trainer.state.global_step}. {left(trainer.args.output_dir)}")
        raise
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        what = str(error).splitlines()[0].strip().rstrip(".")
        raise UserError(
            f"{what}, after step {trainer.state.global_step}. It loads rows; most often the machine or the container "
            "had no more memory (`dmesg` tells). Lower dataloader_num_workers or dataloader_prefetch_factor. "
            f"{left(trainer.args.output_dir)}"
        ) from error


def _check_same_run(checkpoint: Path, marker: dict, run: dict, digests: Any, args: Any) -> Rows:
    """Return the rows of the rest of the run; print what may differ and does, raise if something may not."""
    best = checkpoints.best_of(checkpoint) if args.load_best_model_at_end else None
    if best and (problems := checkpoints.find_problems(best)):
        raise CheckpointError(
            f"load_best_model_at_end: the best checkpoint until {checkpoint.name} was {best.name}, and it cannot be "
            f"loaded at the end. {best}: {'; '.join(problems)}. Put it back beside {checkpoint}, or set "
            "load_best_model_at_end: false to take the last weights as the result."
        )
    known = digests is not None and (checkpoint / FILE).is_file()
    refused, changed = compare_runs(marker["run"], run, same_rows=known)
    if evaluates_on_others(marker["run"], run):
        what = "rows to evaluate on: not those that the run was evaluated on until now"
        if best:
            refused.append(f"{what}, by which {best.name} is the best (load_best_model_at_end)")
        else:
            changed.append(f"{what}. Losses before and after cannot be compared.")
    rows = Rows(digests)
    if known:
        saved = Rows(np.load(checkpoint / FILE, allow_pickle=False), marker["gone"])
        count = checkpoints.step_of(checkpoint) * marker["run"]["rows per step"]
        trained = trained_rows(args, saved, count, marker["run"].get("stream"))
        rows, problem, note = compare_rows(saved, digests, trained)
        refused += [problem] if problem else []
        if note and rows.removed != saved.removed and args.max_steps <= 0:
            note += " The number of steps and the schedule of the learning rate are those of the rows left."
        changed += [note] if note else []
    if refused:
        raise CheckpointError(
            f"{checkpoint} is of another run, and continuing from it would give a result that no run gives:"
            + "".join(f"\n  - {line}" for line in refused)
            + "\nGive the same recipe and data, or name another output_dir to start a new run."
        )
    although = ", although" + "".join(f"\n  - {line}" for line in changed) if changed else "."
    print_main(f"Continuing from {checkpoint}{although}")
    return rows
