"""The reference that a policy is compared with: a model of its own, or one that lies within the policy."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from torch import nn
from trl.trainer.utils import use_adapter

from trl_vpo.forward.head import lm_head
from trl_vpo.forward.scoring import ReferenceSums, Scores
from trl_vpo.trainers.compat import keep_frozen


def loss_reference(trainer: Any, batch: dict) -> Scores | ReferenceSums | None:
    """Return what a method's loss compares with: nothing, what was precomputed, or a pass of the reference."""
    if not trainer.needs_reference:
        return None
    if not trainer.precompute_ref_logps:
        # Around all of it: PEFT freezes an adapter while it is off, and then everything looks frozen.
        with trainer.scorer.record_vision():
            return trainer.reference_scores(batch)
    if "ref_sums" not in batch:
        raise ValueError(
            "these rows carry no precomputed reference log-probs. Give them to the trainer as `train_dataset` or "
            "`eval_dataset`, or call `evaluate` with them."
        )
    return ReferenceSums(batch["ref_sums"])


@torch.no_grad()
def reference_scores(trainer: Any, batch: dict) -> Scores:
    """Score a batch with `ref_model`, the frozen copy of a given adapter, or the base model with the adapter off.

    In evaluation mode, so there is no gradient checkpointing to be switched off. The scores carry the LM head that the
    KL needs. A policy that was its own reference, and has changed, raises ValueError.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is not None:
        reference, switch = trainer.ref_model, contextlib.nullcontext()
    elif is_peft_model(model):
        reference, switch = trainer.model, reference_active(model)
    elif trainer.precompute_ref_logps and trainer.state.global_step == 0:  # the policy still is its reference
        reference, switch = trainer.model, evaluating(trainer.model)
    else:
        problem = f"{trainer._name} has no reference model at this point"
        raise ValueError(f"{problem}. A `ref_model` brings one, and so does training an adapter.")
    with switch, patch.multiple(trainer.scorer, balances=False, squares=False):
        scores = trainer.concatenated_forward(reference, batch)
        scores.head = lm_head(trainer._bare(reference))
        return scores


@contextlib.contextmanager
def reference_active(policy: nn.Module) -> Iterator[None]:
    """Let `policy`, a `PeftModel`, compute its reference for a while."""
    adapter = "ref" if "ref" in policy.peft_config else None
    with keep_frozen(policy), use_adapter(policy, adapter_name=adapter), evaluating(policy):
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep `model` in evaluation mode for a while: without dropout and embedding noise, which belong to training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
