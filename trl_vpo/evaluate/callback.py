"""Held-out measures while training, with the model that is being trained: no second one is built."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import TrainerCallback

from trl_vpo.data.accepted import check_accepted
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.inputs import Inputs, load_media, row_ids
from trl_vpo.data.sources import named_splits
from trl_vpo.errors import EvaluateError, RowError
from trl_vpo.evaluate.config import DAMAGES
from trl_vpo.evaluate.measures import estimate, preference_evidence
from trl_vpo.evaluate.probes import check_media, numbers, own_media, preference_probes, row_seed, run_probes
from trl_vpo.evaluate.rows import EvalRow, preference_row, read_rows
from trl_vpo.forward.tree import Tree, tree_batch
from trl_vpo.models.scoring import Scored, by_tree
from trl_vpo.trainers.reference import evaluating
from trl_vpo.trainers.setup import sharding

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_vpo.trainers.base import VisualPreferenceTrainer

logger = logging.getLogger(__name__)
POLICY, REFERENCE = "policy", "reference"
PREFIX = "eval_heldout/"


class EvaluationCallback(TrainerCallback):
    """Measures preference rows that are not trained on, and adds the measures to the metrics of an evaluation.

    The measures are those of `trl-vpo evaluate` (see docs/metrics.md), without intervals: preference,
    log-probs and sensitivity to damaged media; movement and KL where the trainer has a reference (its `ref_model`, or
    the model without its adapter). Their keys begin with `eval_heldout/`, so `metric_for_best_model` may name one.
    They cost two model passes over each row and its damaged media.

    Every process works on its own share of the rows and all of them get the measures of all rows. Where weights are
    sharded (FSDP, ZeRO-3), every process works on all rows: they must meet in every call.

    Args:
        trainer: of any method; rows are read with its media settings.
        data: a `Dataset`, or what `dataset_name` may be. Rows with a `task` of their own are for `trl-vpo evaluate`;
            a warning counts them.
        every: "eval", at every evaluation of the trainer; or a number of steps.
        split: of the data, where they are no dataset and no file.
        sensitivity: kinds of damaged media; empty for none.
        limit: only the first so many rows.
        seed: with a row's id, fixes how its media are damaged: the same at every step.

    Raises:
        EvaluateError: the rows cannot be used; their media are opened, too.
        ValueError: another `every`, or an unknown kind of damage.

    Example:

    ```python
    trainer = LeanPOTrainer(model="Qwen/Qwen2.5-VL-3B-Instruct", args=args, train_dataset=train_dataset)
    trainer.add_callback(EvaluationCallback(trainer, "data/held_out.jsonl", every=50))
    trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: VisualPreferenceTrainer,
        data: Dataset | str,
        *,
        every: str | int = "eval",
        split: str | None = None,
        sensitivity: tuple[str, ...] = DAMAGES,
        limit: int | None = None,
        seed: int = 0,
    ):
        if every != "eval" and (isinstance(every, (str, bool)) or every < 1):
            raise ValueError(f'every is {every!r}: give "eval" or a number of steps.')
        if unknown := [kind for kind in sensitivity if kind not in DAMAGES]:
            raise ValueError(f"sensitivity: {unknown[0]!r} is not one of {', '.join(DAMAGES)}.")
        self.trainer, self.every, self.sensitivity, self.seed = trainer, every, tuple(sensitivity), seed
        args = trainer.args
        shared = {name: getattr(args, name) for name in ("max_pixels", "max_length", "media_root")}
        self._collator = PreferenceCollator(trainer.processing_class, video=args.video_options(), **shared)
        self._inputs, self._rows = self._read(data, split, limit)
        self._done: tuple[int, dict[str, float]] | None = None  # the step that was measured last, and its measures

    def on_train_begin(self, args, state, control, **kwargs):
        self._done = None  # another model may be at the same step
        if self.every == "eval" and args.eval_strategy == "no":
            logger.warning(
                "EvaluationCallback measures whenever the trainer evaluates, and eval_strategy is 'no': nothing will "
                "be measured in this training. Give every=N to measure every N steps."
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._done = None  # the best model, if it was loaded, stands in the place of the last one

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Add the measures to the metrics of an evaluation; they are taken once a step, however many eval sets."""
        if self.every == "eval":
            measures = self._measured(state.global_step)
            if metrics is not None:
                metrics.update(measures)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every != "eval" and state.global_step % self.every == 0:
            self._measured(state.global_step)

    def _measured(self, step: int) -> dict[str, float]:
        if self._done is None or self._done[0] != step:
            self._done = step, {PREFIX + name: value for name, value in self.measure().items()}
            control, due = self.trainer.control, self.trainer.control.should_log
            self.trainer.log(dict(self._done[1]))
            control.should_log = due  # to log anything cancels the log of the step's losses, which comes later
        return self._done[1]

    def measure(self) -> dict[str, float]:
        """Return the measures of the model as it is now. All processes call this."""
        policy, reference = self.records()
        measures: dict[str, float] = {}
        for rows, clusters in preference_evidence(policy, reference or None).values():
            measures |= {name: found.value for name, found in estimate(rows, clusters, resamples=1).items()}
        return measures

    def records(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return a record of each row for the policy, and for the reference where there is one; see `measure`."""
        trainer = self.trainer
        shared = sharding(trainer) is None
        groups = trainer.row_groups
        rank, ranks = (groups.index, groups.count) if shared else (0, 1)
        mine, size = self._rows[rank::ranks], trainer.args.per_device_eval_batch_size
        records: list[dict[str, Any]] = []
        with torch.no_grad(), evaluating(trainer.model):
            for start in range(0, len(mine), size):
                records += self._batch_records(mine[start : start + size])
        if shared:
            records = sorted(gather_object(records if groups.speaks else []), key=lambda record: record["place"])
        policy, reference = ([r[side] for r in records if side in r] for side in (POLICY, REFERENCE))
        return policy, reference

    def _batch_records(self, rows: list[EvalRow]) -> list[dict[str, Any]]:
        probes = []
        for row in rows:
            source = self._inputs[row.place]
            pair = preference_row(source)
            media = load_media(source, self._collator.video, self._collator.budget)
            media = own_media(pair, media, self._collator)
            seed = row_seed(self.seed, row.id)
            probes.append(preference_probes(pair, media, seed=seed, damages=self.sensitivity))
        records = []
        for row, results in zip(rows, run_probes(probes, self._collator.encode_row, self._score), strict=True):
            if isinstance(results, RowError):
                raise results
            sides = {side: numbers(values) | {"cluster": row.id} for side, values in results.items()}
            records.append({"place": row.place, **sides})
        return records

    def _score(self, trees: list[Tree], kl: bool) -> dict[str, list[list[Scored]]]:
        """The scores of all branches under the policy and, if there is one, the reference. Only the pair needs it."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        batch = trainer._prepare_inputs(tree_batch(trees, self._collator.tokenizer.pad_token_id))
        reference = None
        if kl and (trainer.ref_model is not None or is_peft_model(model)):
            with trainer.scorer.record_vision():
                reference = trainer.reference_scores(batch)
        with trainer.scorer.replay_vision():
            scores = trainer.concatenated_forward(model, batch, reference)
        sides = {POLICY: scores} | ({REFERENCE: reference} if reference is not None else {})
        return {side: by_tree(values, trees) for side, values in sides.items()}

    # --- the rows -------------------------------------------------------------------------------------------------

    def _read(self, data: Dataset | str, split: str | None, limit: int | None) -> tuple[Inputs, list[EvalRow]]:
        if isinstance(data, str):
            split = split or ("train" if data.endswith((".jsonl", ".json", ".parquet")) else "test")
            data = named_splits(data, [split])[split]
        inputs = Inputs(data, row_ids(data), None, self.trainer.args.media_root)
        rows = read_rows(inputs, only="preference")
        if len(rows) < len(inputs):
            others = len(inputs) - len(rows)
            logger.warning(f"{others} held-out rows have a task that only `trl-vpo evaluate` measures.")
        if not rows:
            raise EvaluateError("there are no held-out preference rows.")
        for row in rows[:limit]:
            try:
                check_accepted(preference_row(inputs[row.place]), self.trainer.processing_class)
            except ValueError as error:
                raise EvaluateError(f"held-out {row.name}: {error}") from error
        check_media(rows[:limit], inputs, self.trainer.args)  # an error hours into the training would cost more
        return inputs, rows[:limit]
