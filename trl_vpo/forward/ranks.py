"""The ranks of a step agree on whether their model calls pass the vision tower.

Several processes meet inside a model call; each makes one for a micro-batch. FSDP and ZeRO-3 gather the weights of
every module that is called, so all ranks have to call the same modules in the same order: a rank whose rows hold no
image would leave the others waiting in the vision tower. DDP and ZeRO-2 meet in the backward pass, where they wait for
every weight that is trained.

So a rank with less to do gets padding rows: an image or a video of a few tokens. It is computed like every row, and
then dropped. It belongs to no pair, so all gradients that come from it are zero.
"""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from trl_vpo.forward.families import VISION_INPUTS, vision_inputs


def sync_calls(
    batch: dict,  # a tree batch; it gets `padded`, itself with its padding rows, which `Scorer` reads
    padding_row: Callable[[str | None], dict],  # vision input -> a tree batch of one short row, on the batch's device
    *,
    sharding: str | None,  # what gathers weights in the forward pass: "fsdp", "zero3", or None
    trains_vision: bool,  # something of vision tower or projector is trained
) -> None:
    """Give a tree batch the padding rows that its model call needs. All ranks call this, each with its own batch."""
    if PartialState().num_processes == 1:
        return
    present = vision_inputs(batch["media"])
    ranks = gather_object([present]) if sharding else [present]
    padded = batch
    for name in _missing(present, ranks, sharding, trains_vision):
        padded = _joined(padded, padding_row(name))
    batch["padded"] = padded


def _missing(present: list[str], ranks: list[list[str]], sharding: str | None, trains_vision: bool) -> list[str]:
    """Return the vision inputs that a call needs besides `present`; `ranks` are those of all ranks, this one too."""
    lacking = [name for name in VISION_INPUTS if name not in present]
    if sharding == "zero3":  # compares the modules that each rank calls, and images and videos may differ in them
        return [name for name in lacking if any(name in rank for rank in ranks)]
    if sharding == "fsdp":  # images and videos go through the same weights
        return lacking[: max(map(len, ranks)) - len(present)]
    return lacking[:1] if trains_vision and not present else []


def _joined(batch: dict, extra: dict) -> dict:
    """Return `batch` with the trunks and branches of `extra` behind its own; pairs and all else stay the batch's."""
    joined = batch | {
        name: _stack(batch[name], extra[name]) for name in ("trunk_ids", "trunk_mask", "branch_ids", "branch_mask")
    }
    joined["branch_trunk"] = torch.cat([batch["branch_trunk"], extra["branch_trunk"] + len(batch["trunk_ids"])])
    joined["media"] = batch["media"] + extra["media"]
    joined["trunk_types"] = {
        name: _stack(*(b["trunk_types"].get(name, torch.zeros_like(b["trunk_ids"])) for b in (batch, extra)))
        for name in batch["trunk_types"] | extra["trunk_types"]
    }
    return joined


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """Return the rows of both, padded on the right with zeros, which their masks leave out."""
    width = max(first.size(1), second.size(1))
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.size(1))) for t in (first, second)])
