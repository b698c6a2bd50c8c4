"""TDPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, tokens_of

VARIANTS = ("tdpo1", "tdpo2")


def tdpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float,
    alpha: float = 0.5,
    variant: str = "tdpo2",
) -> PreferenceLoss:
    """TDPO: DPO with a token-wise KL on both sides (Zeng et al., ICML 2024, arXiv 2404.11999).

    Different from the authors' code: `tdpo2` is the default, as in the paper, where the released config trains TDPO1
    and so ignores alpha; and a KL that is computed by log-softmax, where theirs gives nan once a probability of the
    reference underflows.

        r(y)    = sum of logratios of y            k(y) = sum over all tokens of y of KL(pi_ref || pi)
        tdpo1:  u = r(y_w) - r(y_l) - (k(y_l) - k(y_w))
        tdpo2:  u = r(y_w) - r(y_l) - alpha * (k(y_l) - sg(k(y_w)))          (no gradient through k(y_w))
        loss    = -logsigmoid(beta * u)                              reward(y) = beta * (r(y) + k(y))

    Args:
        chosen_logratios: (B, T) log pi - log pi_ref of each token of y_w.
        rejected_logratios: (B, T') the same for y_l.
        chosen_kl: (B, T) exact KL(pi_ref || pi) at each token of y_w, over the full vocabulary, in nats.
        rejected_kl: (B, T') the same for y_l.
        chosen_mask: (B, T) true on the response's tokens.
        rejected_mask: (B, T').
        beta: scale of the reward.
        alpha: weight of the KLs; TDPO2 only.
        variant: "tdpo1" or "tdpo2".

    Raises:
        ValueError: if a response has no tokens, or the variant is unknown.

    Source: Vance0124/Token-level-Direct-Preference-Optimization (2a736ec).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}.")
    tokens_of(chosen_mask, "chosen"), tokens_of(rejected_mask, "rejected")
    values, masks = (chosen_logratios, rejected_logratios, chosen_kl, rejected_kl), (chosen_mask, rejected_mask) * 2
    chosen, rejected, chosen_k, rejected_k = map(masked_sum, as_float(*values), masks)  # (B,) nats per response
    gap = rejected_k - chosen_k if variant == "tdpo1" else alpha * (rejected_k - chosen_k.detach())
    losses = -F.logsigmoid(beta * (chosen - rejected - gap))
    return PreferenceLoss(
        losses=losses,
        chosen_rewards=beta * (chosen + chosen_k).detach(),
        rejected_rewards=beta * (rejected + rejected_k).detach(),
        terms={"preference": losses.detach(), "kl_chosen": chosen_k.detach(), "kl_rejected": rejected_k.detach()},
    )
