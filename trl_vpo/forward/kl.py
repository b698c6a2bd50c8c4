"""The token-wise KL of RRPO: KL(reference || policy) over the whole vocabulary, without the full logits."""

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_vpo.forward.head import Head

FORWARD_KL, TEMPERATURE = 0.0, 1.0  # KL(teacher || student), of the plain distributions


def token_kl(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    """Return the (N,) exact KL(reference || model), in nats, from (N, H) hidden states of both.

    TRL's chunked divergence with beta 0; the gradient flows into `hidden` and `head` only.
    """
    sides = (hidden, head.weight, head.bias, ref_hidden, ref_head.weight, ref_head.bias)
    logits = (head.scale, head.softcap, ref_head.scale, ref_head.softcap)
    return ChunkedDivergenceFunction.apply(*sides, FORWARD_KL, TEMPERATURE, *logits)[0]


def partly_differentiable_kl(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, needs_grad: Tensor
) -> Tensor:
    """Return the (N,) KL with gradients where `needs_grad`, (N,): a metric needs no backward pass."""
    with torch.no_grad():
        rest = token_kl(hidden[~needs_grad], head, ref_hidden[~needs_grad], ref_head)
    kl = token_kl(hidden[needs_grad], head, ref_hidden[needs_grad], ref_head)
    return kl.new_zeros(len(hidden)).masked_scatter(needs_grad, kl).masked_scatter(~needs_grad, rest)
