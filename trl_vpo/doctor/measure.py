"""`trl-vpo doctor --measure`: measure the memory of real steps on the longest rows.

The model is loaded and trained for two steps, by the recipe's own trainer. Not run on a GPU by us: the tests run it on
a CPU, with `LiveBytes` in the place of `CudaPeak`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.errors import RecipeError, as_user_errors
from trl_vpo.training.run import build_trainer

STEPS = 2  # the second has the optimizer's states from its beginning


@dataclass
class Measured:
    """Peak bytes of tensors, and of what the allocator reserved for them (None: unknown)."""

    allocated: int
    reserved: int | None = None


class CudaPeak:
    """Record the peak of torch's allocator on the GPU while in the context."""

    def __init__(self, tensors: Iterable[Tensor] = ()):
        self.peak = self.reserved = 0

    def __enter__(self) -> CudaPeak:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


Meter = Callable[[Iterable[Tensor]], AbstractContextManager]


def check_can_measure(recipe: LoadedRecipe) -> None:
    """Raise RecipeError, before anything is loaded, if there is no GPU or the recipe needs several processes."""
    if not torch.cuda.is_available():
        raise RecipeError(
            f"--measure runs two training steps and needs a CUDA GPU; torch {torch.__version__} sees none here. "
            "Give the command on the machine that will train, or leave --measure out: the estimate needs no GPU."
        )
    if recipe.sharding.kind != "none":
        raise RecipeError(
            f"--measure runs one process, and this recipe trains with {recipe.sharding}. Leave --measure out, or "
            "give --accelerate_config single_gpu --num_processes 1."
        )


def measure(recipe: LoadedRecipe, rows: Dataset, meter: Meter = CudaPeak) -> Measured:
    """Load the model and measure two steps on micro-batches of the longest rows, as many as a micro-batch has.

    `meter` is `CudaPeak`, or `LiveBytes` on a CPU. Raises torch.OutOfMemoryError.
    """
    args = copy.copy(recipe.args)
    args.max_steps, args.save_strategy, args.load_best_model_at_end = STEPS, SaveStrategy.NO, False
    args.report_to, args.push_to_hub, args.disable_tqdm = [], False, True
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    indices = list(range(len(rows))) * args.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as args.output_dir, as_user_errors():
        trainer = build_trainer(recipe.method, recipe.script_args, args, recipe.model_args, rows.select(indices))
        return measure_training(trainer, meter)


def measure_training(trainer: Any, meter: Meter) -> Measured:
    """Measure the peak while a trainer trains, its models included."""
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    tensors += [t.quant_state.absmax for t in tensors if getattr(t, "quant_state", None) is not None]
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    with torch.no_grad():
        trainer.concatenated_forward(trainer.model, batch)  # and with it the proof of the model, which is no step
    with meter(tensors) as peak:
        trainer.train()
    return Measured(peak.peak, getattr(peak, "reserved", None))
