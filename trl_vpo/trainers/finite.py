"""End a run whose losses or weights are nan or infinite before anything of them is saved."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from trl_vpo.errors import NonFiniteLossError
from trl_vpo.trainers.setup import sharding


def check_losses(losses: Tensor, names: list[str], step: int) -> None:
    """Raise NonFiniteLossError where one of the losses of B pairs, (B,), is not finite."""
    if torch.isfinite(losses).all():
        return
    bad = [name for name, finite in zip(names, torch.isfinite(losses).tolist()) if not finite]
    raise NonFiniteLossError(
        f"the loss is not finite at step {step} for: {'; '.join(bad)}. Nothing was saved after the last checkpoint. "
        "Lower the learning rate, try bf16 instead of fp16, and look at these rows."
    )


def check_weights(trainer: Any) -> None:
    """Raise NonFiniteLossError for ruined weights: a step with a finite loss may still end in nan.

    Of sharded weights each rank has a part: they all call this, and all raise.
    """
    trained = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters() if p.requires_grad]  # ZeRO-3's part
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    finite = all(torch.isfinite(part).all() for part in parts)
    if sharding(trainer):
        finite = all(gather_object([finite]))
    if not finite:
        raise NonFiniteLossError(
            f"the weights are not finite after step {trainer.state.global_step}; they are not saved. Go back to the "
            "last checkpoint with a lower learning rate, or bf16 instead of fp16."
        )
