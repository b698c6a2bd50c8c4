"""What all losses share: their result, and sums over the tokens of a response."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class PreferenceLoss:
    """The result of a preference loss for B pairs; all but `losses` is detached."""

    losses: Tensor  # (B,) with gradient; the training loss is `losses.mean()`
    chosen_rewards: Tensor  # (B,) nats times beta
    rejected_rewards: Tensor  # (B,) nats times beta
    terms: dict[str, Tensor] = field(default_factory=dict)  # (B,) parts of the loss by metric name, unweighted


def as_float(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last dimension where `mask`; what lies outside (padding, even inf or nan) has no influence."""
    return values.masked_fill(~mask.bool(), 0.0).sum(-1)


def tokens_of(mask: Tensor, side: str) -> Tensor:
    """(B,) tokens per response. A response without tokens has no reward: better an error than a silent zero."""
    counts = mask.bool().sum(-1)
    if (counts == 0).any():
        rows = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"{side} responses {rows} of the batch have no tokens: every response needs at least one.")
    return counts


def nll_per_pair(sums: Tensor, tokens: Tensor, tokens_per_pair: Tensor | float | None) -> Tensor:
    """(B,) negative log-likelihoods whose mean over a batch is the mean over all of the batch's chosen tokens.

    `tokens_per_pair`: mean length of the chosen responses of the whole batch. None: these B pairs are the batch.
    """
    if tokens_per_pair is None:
        tokens_per_pair = tokens.sum().to(sums) / len(tokens)
    return -sums / tokens_per_pair
