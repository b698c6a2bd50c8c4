"""RRPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum


def rrpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_phrase_mask: Tensor,
    rejected_phrase_mask: Tensor,
    chosen_kl: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float,
    alpha: float,
) -> PreferenceLoss:
    """RRPO: reward on the phrases that differ, plus a token-wise KL (Sarkar & Etemad 2025, arXiv 2504.12083).

        u    = beta * (sum over phrase tokens of y_w of logratio - the same over phrase tokens of y_l)
        loss = -logsigmoid(u) + alpha * sum over all tokens of y_w of KL(pi_ref || pi)

    The KL is a penalty, so it is added: the paper's formula, read literally, would reward divergence.

    Args:
        chosen_logratios: (B, T) log pi - log pi_ref of each token of y_w.
        rejected_logratios: (B, T') the same for y_l.
        chosen_phrase_mask: (B, T) true on the tokens of the phrases that differ.
        rejected_phrase_mask: (B, T').
        chosen_kl: (B, T) exact KL(pi_ref || pi) at each token of y_w, over the full vocabulary, in nats.
        chosen_mask: (B, T) true on all tokens of y_w.
        beta: scale of the reward.
        alpha: weight of the KL.

    Raises:
        ValueError: if neither response of a pair has a phrase token (the pair would have no preference term).
    """
    chosen_logratios, rejected_logratios, chosen_kl = as_float(chosen_logratios, rejected_logratios, chosen_kl)
    bare = ~(chosen_phrase_mask.bool().any(-1) | rejected_phrase_mask.bool().any(-1))  # (B,)
    if bare.any():
        raise ValueError(
            f"pairs {bare.nonzero().flatten().tolist()} of the batch have no phrase tokens on either side: "
            "RRPO has nothing to reward there."
        )
    chosen_rewards = beta * masked_sum(chosen_logratios, chosen_phrase_mask)  # (B,)
    rejected_rewards = beta * masked_sum(rejected_logratios, rejected_phrase_mask)
    preference = -F.logsigmoid(chosen_rewards - rejected_rewards)
    kl = masked_sum(chosen_kl, chosen_mask)  # (B,) nats per response
    return PreferenceLoss(
        losses=preference + alpha * kl,
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
        terms={"preference": preference.detach(), "kl": kl.detach()},
    )
