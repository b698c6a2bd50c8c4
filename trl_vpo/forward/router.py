"""The load-balancing loss of mixture-of-experts models, as in `trl.DPOTrainer`, from the routers of our own call.

TRL has a prompt once for each of its responses. So each column of a call counts as often as TRL's rows hold its token:
that of a shared prompt once for each of its branches, padding not at all. The loss is the same in all layouts.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trl_vpo.errors import ModelError
from trl_vpo.forward.layouts import Layout
from trl_vpo.forward.sequence_parallel import SequenceRanks


def column_counts(layout: Layout, branches: int) -> Tensor:
    """Return how often each column of a call counts, (R, L); those of padding rows, behind `branches`, do not."""
    real = layout.branches < branches  # (S,)
    if layout.segments is None:
        return layout.inputs["attention_mask"] * real.unsqueeze(1)
    counts, spans, each = [], [], iter(real.tolist())
    for prompt, responses in layout.lengths:
        own = [int(next(each)) for _ in responses]
        counts += [sum(own), *own]
        spans += [prompt - 1, *(1 + response for response in responses)]
    return torch.tensor(counts).repeat_interleave(torch.tensor(spans)).unsqueeze(0).to(real.device)


@contextlib.contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Give what the routers of a model's next call compute, (R * L, E) for each layer with experts.

    The decoder records it. Layers that gradient checkpointing computes again are not recorded again.
    """
    decoder, logits = model.get_decoder(), []
    hooks = [
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"output_router_logits": True}), with_kwargs=True
        ),
        decoder.register_forward_hook(lambda _, args, output: logits.extend(output.get("router_logits") or ())),
    ]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def load_balancing_loss(
    model: PreTrainedModel,
    logits: list[Tensor],  # of its routers; those of this rank's columns where `ranks` share the call
    counts: Tensor,  # (R, L) of `column_counts`
    ranks: SequenceRanks | None = None,
) -> Tensor:
    """Return the loss of equations 4 to 6 of https://huggingface.co/papers/2101.03961 over all layers."""
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if ranks is not None and logits:
        together = ranks.collect(torch.cat(logits, dim=1), counts.numel())  # (L, layers * E)
        logits = together.split([x.size(1) for x in logits], dim=1)
    if not logits or top_k is None or any(x.shape[:-1] != (counts.numel(),) for x in logits):
        raise ModelError(
            f"the load-balancing loss of {type(model).__name__} cannot be computed: its routers do not give a number "
            "for each token and expert. Set router_aux_loss_coef to 0.0 to train without it."
        )
    return load_balancing_loss_func(tuple(logits), logits[0].size(-1), top_k, counts).to(counts.device)
