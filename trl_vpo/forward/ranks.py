"""What the ranks of a step agree on: how many model calls they make, and which of them pass the vision tower.

Several processes meet inside a model call. FSDP and ZeRO-3 gather the weights of every module that is called, so all
ranks have to call the same modules in the same order: a rank whose rows hold no image would leave the others waiting
in the vision tower. DDP and ZeRO-2 meet in the backward pass, where they wait for every weight that is trained.

So the ranks with less to do are given fillers: a text, an image or a video of a few tokens, which joins a call as a
row of its own, or makes up a call of its own. It is computed like every row, and then it is dropped. It belongs to no
pair, so all gradients that come from it are zero.
"""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

VISION_INPUTS = ("pixel_values", "pixel_values_videos")  # each takes one pass through the vision tower in a call


def agree_on_calls(
    batch: dict, filler: Callable[[str | None], dict], *, sharding: str | None, trains_vision: bool
) -> None:
    """Decide on the model calls of a tree batch. All ranks call this, each with its own batch.

    Args:
        batch: a tree batch. It is given `calls`, the trunks of each call, and `filled`, the batch with its fillers;
            `Scorer` reads both.
        filler: a tree batch of one short row with the given vision input (None: text), on the batch's device.
        sharding: what gathers weights in the forward pass: "fsdp", "zero3", or None.
        trains_vision: something of vision tower or projector is trained.
    """
    if PartialState().num_processes == 1:
        return
    calls = sorted(stackable(batch["media"]), key=lambda trunks: -len(_inputs(batch, trunks)))
    ranks = gather_object([[_inputs(batch, trunks) for trunks in calls]])  # the inputs of each rank's calls
    filled = batch
    for i in range(max(map(len, ranks))):
        trunks = calls[i] if i < len(calls) else []
        there, others = _inputs(batch, trunks), [rank[i] for rank in ranks if i < len(rank)]
        missing = _missing(there, others, sharding, trains_vision)
        for name in missing if trunks or missing else [None]:
            trunks = [*trunks, len(filled["trunk_ids"])]
            filled = _joined(filled, filler(name))
        calls[i : i + 1] = [trunks]
    batch |= {"calls": calls, "filled": filled}


def _missing(there: list[str], others: list[list[str]], sharding: str | None, trains_vision: bool) -> list[str]:
    """The vision inputs that a call needs besides those that it has; `others` are all ranks', this one's too."""
    lacking = [name for name in VISION_INPUTS if name not in there]
    if sharding == "zero3":  # compares the modules that each rank calls, and images and videos may differ in them
        return [name for name in lacking if any(name in other for other in others)]
    if sharding == "fsdp":  # images and videos go through the same weights
        return lacking[: max(map(len, others)) - len(there)]
    return lacking[:1] if trains_vision and not there else []


def _inputs(batch: dict, trunks: list[int]) -> list[str]:
    """Which inputs of the vision tower a call has."""
    return [name for name in VISION_INPUTS if any(name in batch["media"][trunk] for trunk in trunks)]


def stackable(media: list[dict]) -> list[list[int]]:
    """Trunks grouped by the frame shape of their videos; trunks without videos go with the first group."""
    shapes: dict = {}
    for trunk, tensors in enumerate(media):
        video = tensors.get("pixel_values_videos")
        shape = tuple(video.shape[1:]) if video is not None and video.dim() == 5 else None
        shapes.setdefault(shape, []).append(trunk)
    rest = shapes.pop(None, [])
    groups = list(shapes.values()) or [[]]
    groups[0] = sorted(groups[0] + rest)
    return groups


def _joined(batch: dict, extra: dict) -> dict:
    """`batch` with the trunks and branches of `extra` behind its own; pairs and all the rest stay the batch's."""
    rows = len(batch["trunk_ids"])
    joined = batch | {name: _stack(batch[name], extra[name]) for name in _TABLES}
    joined["branch_trunk"] = torch.cat([batch["branch_trunk"], extra["branch_trunk"] + rows])
    joined["media"] = batch["media"] + extra["media"]
    types = {}
    for name in batch["trunk_types"] | extra["trunk_types"]:
        parts = [b["trunk_types"].get(name, torch.zeros_like(b["trunk_ids"])) for b in (batch, extra)]
        types[name] = _stack(*parts)
    return joined | {"trunk_types": types}


_TABLES = ("trunk_ids", "trunk_mask", "branch_ids", "branch_mask")


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both, padded on the right with zeros, which their masks leave out."""
    width = max(first.size(1), second.size(1))
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.size(1))) for t in (first, second)])
