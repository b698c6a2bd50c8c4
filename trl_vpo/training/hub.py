"""Pushing to the Hub while training goes on. A push that fails never ends a training.

In place of the pushes of `transformers.Trainer` 5.23, which
- upload the whole `output_dir`, with caches, logs and `training_args.bin`, a pickle that holds `hub_token`;
- upload a checkpoint while it may be deleted, and before it is marked as complete: nothing could continue from it;
- drop the errors of background uploads, and let any other error end the run, whether training is done or not.

Here, what is wrong for good ends the run before the model is loaded. Everything else (no network, 5xx, no answer) is
reported, and tried again with the next save and at the end; then the command that pushes by hand is printed.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from trl_vpo.errors import HubError
from trl_vpo.training.hub_repo import HubRepo, is_refusal
from trl_vpo.training.main_process import on_main_process, print_main

ADAPTER = ("adapter_config.json", "adapter_model*.safetensors")
MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json")
LAST = "last-checkpoint"  # folder in the repo, as transformers names it
RETRY_WAITS = (5, 30)  # seconds before the second and third try at the end; single requests are retried as well


def connect(args: Any) -> HubPush | None:
    """Take over `push_to_hub`: create the repo and check that it can be written. All ranks call this.

    `args`, `TrainingArguments` before a trainer is made of them, are changed: the trainer must not push by itself.
    Where the Hub cannot be reached now, that is printed. Returns the pushes of the run on the main process. Raises
    HubError where no push of this run would succeed.
    """
    push = HubPush(args) if args.push_to_hub else None
    args.push_to_hub, args.hub_token = False, None  # training_args.bin would hold the token
    if push is not None:
        on_main_process(push.open)
    return push if PartialState().is_main_process else None


class HubPush(TrainerCallback):
    """The pushes of a run.

    A save starts a push, unless one is going on: then it is part of the next one. `hub_model_id`, `hub_strategy`,
    `hub_token`, `hub_private_repo` and `hub_revision` mean what they mean to transformers.
    """

    def __init__(self, args: Any):
        self.repo = HubRepo(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
        self._folder, self._strategy = Path(args.output_dir), HubStrategy(args.hub_strategy)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._job: Future | None = None
        self._missing: dict[str, Path] = {}  # path in the repo: the checkpoint that belongs there
        self._reading: set[Path] = set()  # checkpoints of the push that is going on
        self._is_down = False  # the last push failed

    def in_use(self) -> set[Path]:
        """The checkpoints that must not be deleted now: they are read, or will be; not by a Hub that is down."""
        return self._reading | (set() if self._is_down else set(self._missing.values()))

    def open(self) -> None:
        """Create or check the repo, see `HubRepo.open`."""
        try:
            self.repo.open()
        except HubError:
            raise
        except Exception as error:
            print_main(
                f"the Hub cannot be reached: {self.repo.reason(error)}. Training continues; pushing is tried again "
                "with each save and at the end."
            )

    def attach(self, trainer: Any, dataset_name: str | None) -> None:
        """Push what this trainer saves, with a card that names this dataset."""
        self._trainer, self._dataset_name = trainer, dataset_name
        trainer.add_callback(self)
        self._patterns = ADAPTER if is_peft_model(trainer.model) else MODEL
        with tempfile.TemporaryDirectory() as folder:
            trainer.processing_class.save_pretrained(folder)
            self._processor = sorted(_files_below(Path(folder)))
        disable_progress_bars()  # of uploads, in the middle of the trainer's own

    def add_earlier(self, checkpoints: list[Path]) -> None:
        """Push those of these checkpoints, of earlier parts of the run, that the repo lacks, with the next push."""
        if self._strategy is not HubStrategy.ALL_CHECKPOINTS or not checkpoints:
            return
        try:
            arrived = {path.split("/")[0] for path in self.repo.files()}
        except Exception as error:  # then once more: what is there already is not uploaded twice
            print_main(f"which checkpoints arrived at the Hub is not known: {self.repo.reason(error)}.")
            arrived = set()
        self._missing |= {folder.name: folder for folder in checkpoints if folder.name not in arrived}

    def on_save(self, args, state, control, **kwargs):
        """Start to push a checkpoint. It is marked by now, and older ones are deleted."""
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        path = {HubStrategy.CHECKPOINT: LAST, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(self._strategy)
        if path:
            self._missing[path] = checkpoint
        if self._strategy is HubStrategy.END or (self._job is not None and not self._job.done()):
            return
        missing = {path: folder for path, folder in self._missing.items() if folder.is_dir()}
        try:
            self._trainer.create_model_card(model_name=self.repo.name, dataset_name=self._dataset_name)
            card = {"README.md": (self._folder / "README.md").read_bytes()}  # the next save writes it anew
            files = self._model_files(checkpoint) | card
        except Exception as error:
            self._report_failure(state.global_step, error)
        else:
            self._reading = {checkpoint, *missing.values()}
            self._job = self._thread.submit(self._push, state.global_step, files, missing)

    def _model_files(self, folder: Path) -> dict[str, Path | bytes]:
        """The files that loading a saved model needs, and nothing else of the folder: name -> file."""
        weights = {p.name: p for pattern in self._patterns for p in sorted(folder.glob(pattern))}
        if not any(name.endswith(".safetensors") for name in weights):
            raise FileNotFoundError(f"{folder} has no weights in safetensors files")
        return weights | {name: folder / name for name in self._processor if (folder / name).is_file()}

    def _push(self, step: int, files: dict[str, Path | bytes], missing: dict[str, Path]) -> None:
        """In the background."""
        self._is_down = False
        try:
            self._commit(f"Training in progress, step {step}", files, missing)
        except Exception as error:
            self._is_down = True
            self._report_failure(step, error)
        self._reading = set()

    def _commit(self, message: str, files: dict[str, Path | bytes], missing: dict[str, Path]) -> None:
        for path, folder in missing.items():
            files = files | _files_below(folder, f"{path}/")
        self.repo.commit(files, message, replace=LAST if LAST in missing else None)
        for path, folder in missing.items():
            if self._missing.get(path) == folder:  # not a later one meanwhile
                del self._missing[path]

    def _report_failure(self, step: int, error: Exception) -> None:
        print_main(
            f"step {step} was not pushed to the Hub: {self.repo.reason(error)}. Training continues; the next push "
            "comes with the next save."
        )

    def finish(self) -> None:
        """Push the result, and checkpoints that did not arrive; print what was pushed, or how to do it by hand.

        Call it after `Trainer.end`: other processes need not wait for an upload.
        """
        self._thread.shutdown(wait=True)
        for path in [path for path, folder in self._missing.items() if not folder.is_dir()]:
            print_main(
                f"{self._missing.pop(path).name} was not pushed, and save_total_limit has deleted it meanwhile."
            )
        files: dict[str, Path | bytes] = {}
        try:
            files = self._model_files(self._folder)
            files |= {p.name: p for name in ("README.md", "run.json") if (p := self._folder / name).is_file()}
            self._commit_with_retries(files)
        except Exception as error:
            self._print_not_pushed(error, list(files))
        else:
            print_main(f"pushed to {self.repo.url}.")

    def _commit_with_retries(self, files: dict[str, Path | bytes]) -> None:
        for wait in (*RETRY_WAITS, None):
            try:
                return self._commit("End of training", files, dict(self._missing))
            except Exception as error:
                if wait is None or is_refusal(error):
                    raise
                print_main(f"pushing to the Hub failed: {self.repo.reason(error)}. Again in {wait} s.")
                time.sleep(wait)

    def _print_not_pushed(self, error: Exception, names: list[str]) -> None:
        """Print the command that pushes what the last commit was to bring, each checkpoint under its own name."""
        checkpoints = [folder.name for folder in self._missing.values()]
        command = ["hf", "upload", self.repo.name, str(self._folder), ".", "--commit-message", "End of training"]
        for pattern in (*(names or self._patterns), *(f"{name}/*" for name in checkpoints)):
            command += ["--include", pattern]
        command += ["--private"] if self.repo.private else []
        command += ["--revision", self.repo.revision] if self.repo.revision else []
        print_main(
            f"NOT PUSHED to {self.repo.url}: {', '.join([f'the result in {self._folder}', *checkpoints])}. "
            f"{self.repo.reason(error)}.\nTraining is done, and everything is saved. To push it by hand, log in with "
            f"`hf auth login` or HF_TOKEN, and:\n  {shlex.join(command)}"
        )


def _files_below(folder: Path, prefix: str = "") -> dict[str, Path | bytes]:
    """Return path from the folder, with a prefix -> file."""
    return {f"{prefix}{p.relative_to(folder).as_posix()}": p for p in sorted(folder.rglob("*")) if p.is_file()}
