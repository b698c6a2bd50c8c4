"""The trainer under all methods: `trl.DPOTrainer` with rows that may hold videos, and one forward pass of our own.

row -> collator -> tree batch -> `concatenated_forward` -> per-token scores -> `preference_loss` -> metrics
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.trainer.utils import get_config_model_id

from trl_vpo.data.check import prepare_dataset
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.rows import COLUMNS, REF_SUMS, ROW_INDEX
from trl_vpo.forward.scorer import Scorer
from trl_vpo.forward.scoring import Scores
from trl_vpo.losses import PreferenceLoss
from trl_vpo.models.adapters import check_adapted
from trl_vpo.models.attach import check_checkpoint
from trl_vpo.trainers import compat, setup
from trl_vpo.trainers.card import write_model_card
from trl_vpo.trainers.config import VisualPreferenceConfig
from trl_vpo.trainers.finite import check_losses, check_weights
from trl_vpo.trainers.logs import LoggingTrainer
from trl_vpo.trainers.padding_rows import padding_row
from trl_vpo.trainers.precompute import ReferenceCache
from trl_vpo.trainers.rates import check_rates
from trl_vpo.trainers.reference import loss_reference, reference_scores


class VisualPreferenceTrainer(LoggingTrainer):
    """The base of all methods. It takes what [`trl.DPOTrainer`] takes; rows follow `trl_vpo.data.rows`.

    A method sets `config_class`, `_name`, `_tag_names`, `_paper` and what it needs (`needs_*`), and defines
    `preference_loss`. Differences from `trl.DPOTrainer`:
    - videos, images, text and mixtures of them go through one collator and one code path;
    - nothing is truncated, and rows that cannot be trained on are refused before the first step;
    - log-probs are computed at response tokens only;
    - `compute_metrics` gets summed log-probs as predictions and numbers of tokens as label ids, (chosen, rejected).

    Raises:
        RowError: rows break the contract or their media cannot be read.
        ValueError: an option, model or dataset that the method cannot take; the message says why.
    """

    config_class: type[VisualPreferenceConfig]
    needs_reference = True  # the loss compares with a reference model
    needs_kl = False  # ... token by token, over the whole vocabulary: `scores.kl`
    needs_phrases = False  # rows mark the phrases that differ: `batch["phrase_mask"]`; "paired": `batch["phrase_ids"]`

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: VisualPreferenceConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: "PeftConfig | None" = None,
    ):
        args = self._checked_args(model, ref_model, args, data_collator, train_dataset, peft_config)
        setup.check_named_class(model, args)
        peft_config = setup.resolve_target_modules(peft_config, model, args)
        if processing_class is None:
            processing_class = setup.load_processing_class(model, args)
        setup.set_pad_token(processing_class, args)
        self._given_collator = data_collator
        self._prepared = WeakSet()  # not a mark in them: what a user derives from one is not checked
        train_dataset = self._prepare_dataset(train_dataset, processing_class, args, "train")
        eval_dataset = self._prepare_eval(eval_dataset, processing_class, args)
        holds_reference = self.needs_reference and not args.precompute_ref_log_probs
        if holds_reference and ref_model is None and setup.copies_reference(model, args, peft_config):
            ref_model = copy.deepcopy(model)  # exact, and works for a model that was never saved
        with contextlib.ExitStack() as corrections:
            corrections.enter_context(compat.without_trl_precomputing(args))
            if not holds_reference:
                corrections.enter_context(compat.without_reference_model(isinstance(model, str)))
            if isinstance(model, PeftModel) and peft_config is None:
                corrections.enter_context(compat.keep_frozen(model))
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator or self.make_collator(processing_class, args),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if peft_config is not None:
            check_adapted(self.model)
        self._finish_init()

    # --- construction ---------------------------------------------------------------------------------------------

    def _checked_args(self, model, ref_model, args, data_collator, train_dataset, peft_config):
        """Return the config, after refusing what cannot be trained. Nothing is loaded."""
        setup.check_class(type(self), VisualPreferenceTrainer)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config) or type(model).__name__
            args = self.config_class(f"{name.rstrip('/').split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(args).__name__}: each "
                "method has fields of its own."
            )
        if not self.needs_reference and ref_model is not None:
            raise ValueError(f"{self._name} has no reference model. Leave `ref_model` out.")
        revision = (args.model_init_kwargs or {}).get("revision")
        compares = self.needs_reference or args.eval_divergence
        setup.check_model(model, ref_model, peft_config, needs_reference=compares, revision=revision)
        setup.check_collator(data_collator)
        setup.check_memory(args, adapted=peft_config is not None or isinstance(model, PeftModel))
        setup.check_dataset(train_dataset)
        return args

    @classmethod
    def make_collator(cls, processing_class: Any, args: VisualPreferenceConfig) -> PreferenceCollator:
        """Return the collator of the method: rows to tree batches."""
        return PreferenceCollator(
            processing_class,
            video=args.video_options(),
            max_pixels=args.max_pixels,
            max_length=args.max_length,
            phrases=cls.needs_phrases,
            media_form=args.media_form,
            media_contrast=args.media_contrast,
            num_images=args.num_images,
            visual_prompt=args.visual_prompt,
            scores=args.scores,
            media_root=args.media_root,
            frame_cache=args.frame_cache,
        )

    def _finish_init(self) -> None:
        setup.check_router(self)
        setup.check_recomputing(self)
        setup.check_divergence(self)
        if is_peft_model(self.model) and "ref" in self.model.peft_config:  # DPOTrainer copies a given adapter
            if self.needs_reference or self.args.eval_divergence:
                compat.copy_whole_adapter(self.model)
            else:
                self.model.delete_adapter("ref")  # nothing would read it
        setup.warn_of_low_rate(self)
        check_rates(self)
        if self.args.disable_dropout:
            compat.turn_off_dropout(self.model)
        compat.keep_4bit_weights_trainable(self.model)
        compat.keep_attention(self._bare(self.model))
        compat.undo_bfloat16_adapters(self)
        self.scorer = Scorer(
            self._bare(self.model),
            layout=self.args.layout,
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=None if (multiple := self.args.pad_to_multiple_of) == "auto" else multiple,
            ranks=self.row_groups.ranks,
            balances=self.aux_loss_enabled,
            kl_sides=self.args.kl_sides,
        )
        if self.ref_model is not None:
            self.ref_model.eval()  # a copy of a model in training mode is in training mode
            self.scorer.add_model(self._bare(self.ref_model))
        if isinstance(self.data_collator, PreferenceCollator):  # in its workers: half of what goes to the GPU
            self.data_collator.pixel_dtype = self.scorer.pixel_dtype
        setup.add_proof_rows(self, list(self._prepared))
        compat.wrap_existing_layers(self)
        self._is_vision_dataset = False  # `evaluate` then prepares its dataset as `__init__` did
        self._start_logs()
        self._padding_rows = functools.cache(functools.partial(padding_row, self))
        if self.args.precompute_ref_log_probs:
            self.precompute_ref_logps = True  # `without_trl_precomputing` hid it from DPOTrainer
            self._reference_cache = ReferenceCache(self)
            self._reference_cache.attach_all()

    def _bare(self, model: Any) -> PreTrainedModel:
        """Return the model without distributed wrappers and PEFT."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    # --- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Number the rows and check them, instead of TRL's tokenization. This trainer's own datasets pass through."""
        if dataset in self._prepared:
            return dataset
        setup.check_dataset(dataset, dataset_name)
        collator = self._given_collator
        if not isinstance(collator, PreferenceCollator):  # none, or one of the user's own around it
            collator = self.make_collator(processing_class, args)
        dataset = prepare_dataset(
            dataset,
            args,
            name=dataset_name,
            processing_class=processing_class,
            phrases=self.needs_phrases,
            collator=collator,
        )
        dataset = compat.drop_empty_media_columns(dataset, processing_class)
        self._prepared.add(dataset)
        if hasattr(self, "scorer"):
            setup.add_proof_rows(self, [dataset])
        return dataset

    def _prepare_eval(self, eval_dataset, processing_class, args):
        if isinstance(eval_dataset, dict):
            return {k: self._prepare_dataset(d, processing_class, args, k) for k, d in eval_dataset.items()}
        return None if eval_dataset is None else self._prepare_dataset(eval_dataset, processing_class, args, "eval")

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*COLUMNS, ROW_INDEX, REF_SUMS]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """Take the place of TRL's, which takes text only; its `evaluate` calls this."""
        return self._reference_cache.attach(dataset, name, batch_size)

    # --- forward --------------------------------------------------------------------------------------------------

    def concatenated_forward(self, model: torch.nn.Module, batch: dict, reference: Scores | None = None) -> Scores:
        """Score all branches of a tree batch.

        Args:
            model: the policy or the reference, wrapped or not.
            batch: from the collator (see `trl_vpo.forward.tree`), on the model's device.
            reference: the reference's scores of the same batch; adds `Scores.kl`, with gradients for `args.kl_sides`.

        Returns:
            `Scores` of all S branches, (S, T) each.
        """
        with self.accelerator.autocast():  # also outside the wrapped call: for the reference, and to compare layouts
            return self.scorer.score(model, batch, reference)

    def reference_scores(self, batch: dict) -> Scores:
        """Return the scores of `ref_model`, of the frozen copy of a given adapter, or of the base model."""
        return reference_scores(self, batch)

    def compute_ref_log_probs(self, model, inputs):
        """Return the reference's summed log-probs of a batch, chosen and rejected, (B,) each; `model` is unused."""
        sums = self.reference_scores(inputs).sums  # (S,)
        return sums[inputs["chosen"]], sums[inputs["rejected"]]

    # --- training and saving --------------------------------------------------------------------------------------

    @compat.record_error  # a launcher stops all ranks when one fails; it then ends with that one's error
    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint and self.args.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference in training, and checkpoints do not hold it: a resumed run would "
                "compare with the first reference again. Start a new run, or set sync_ref_model=False."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        if is_peft_model(self.model) and (folder / "adapter_model.safetensors").is_file():
            check_checkpoint(self.model, folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        compat.load_renamed_weights(self, folder)

    def _load_best_model(self):
        super()._load_best_model()
        if Path(self.state.best_model_checkpoint).is_dir():
            compat.load_renamed_weights(self, Path(self.state.best_model_checkpoint))

    def predict(self, test_dataset, *args, **kwargs):
        return super().predict(self._prepare_eval(test_dataset, self.processing_class, self.args), *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save as `Trainer` does; ruined weights raise NonFiniteLossError instead."""
        check_weights(self)
        with contextlib.nullcontext() if _internal_call else compat.full_state_dict(self):  # internal: a checkpoint
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write a card that names method, paper, base model and dataset, and shows how to load the result."""
        if self.is_world_process_zero():
            write_model_card(self, model_name, dataset_name, tags)

    # --- loss -----------------------------------------------------------------------------------------------------

    def preference_loss(self, scores: Scores, reference: Scores | None, batch: dict) -> PreferenceLoss:
        """Compute the losses of B pairs from per-token scores: this is the method."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean loss of the batch's pairs; with `return_outputs` also its `Scores`. All ranks call this.

        The `weights` of rows multiply their losses. The sum is divided by the number of pairs: with the `totals` of an
        optimizer step by the mean number in its micro-batches, over which, as over ranks, `Trainer` averages.

        Raises NonFiniteLossError: the loss is nan or infinite.
        """
        self.scorer.sync_calls(inputs, self._padding_rows, setup.sharding(self))
        with self.accelerator.autocast():  # the policy: its reference comes first, and may be another model
            self.scorer.prove(model, inputs)
        reference = compared = loss_reference(self, inputs)
        measures = self.args.eval_divergence and not self.model.training
        if measures and not isinstance(reference, Scores):
            compared = self.reference_scores(inputs)
        with self.scorer.replay_vision():
            scores = self.concatenated_forward(model, inputs, compared if self.needs_kl or measures else None)
        out = self.preference_loss(scores, reference, inputs)
        out.losses = out.losses * inputs["weights"]
        if self.aux_loss_enabled:
            out.losses = out.losses + self.router_aux_loss_coef * scores.aux_loss
        check_losses(out.losses, inputs["names"], self.state.global_step)
        pairs = len(out.losses)
        if inputs.get("totals") is not None:
            pairs = inputs["totals"][0] / self.current_gradient_accumulation_steps / self.accelerator.num_processes
        loss = out.losses.sum() / pairs
        self._record(scores, compared, out, inputs, loss)
        return (loss, scores) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(setup.check_batch(inputs))
        self._own_losses, self._own_scores = [], None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, return_outputs=not prediction_loss_only)
            loss = (loss if prediction_loss_only else loss[0]).detach()
            scores, self._own_scores = self._own_scores, None  # not what a subclass may return in their place
            self._record_returned(loss, len(inputs["chosen"]))
            if prediction_loss_only:
                return loss, None, None
            if scores is None:  # a subclass has a loss of its own
                scores = self.concatenated_forward(model, inputs)
        sides, tokens = (scores.chosen, scores.rejected), scores.mask.sum(-1)  # (B,) each, (S,)
        return loss, tuple(scores.sums[s] for s in sides), tuple(tokens[s] for s in sides)
