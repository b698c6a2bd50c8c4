"""DDPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, tokens_of


def ddpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    chosen_phrase_mask: Tensor,
    rejected_phrase_mask: Tensor,
    *,
    beta: float,
    phrase_weight: float,
    normalize: bool = False,
) -> PreferenceLoss:
    """DDPO: DPO in which changed tokens weigh more (RLHF-V, Yu et al., CVPR 2024, arXiv 2312.00849).

    Paper and released recipe differ, and their coefficients must not be mixed: the recipe sums (beta 0.1, phrase
    weight 1.1), the paper normalizes (beta 0.5, phrase weight 5).

        w_t  = phrase_weight on the tokens of phrases that differ, 1 on the others
        s(y) = sum of w_t * logratio_t             with `normalize` divided by the sum of w_t
        loss = -logsigmoid(beta * (s(y_w) - s(y_l)))                                   reward(y) = beta * s(y)

    Args:
        chosen_logratios: (B, T) log pi - log pi_ref of each token of y_w.
        rejected_logratios: (B, T') the same for y_l.
        chosen_mask: (B, T) true on the response's tokens.
        rejected_mask: (B, T').
        chosen_phrase_mask: (B, T) true on the tokens of the phrases that differ; a response may have none.
        rejected_phrase_mask: (B, T').
        beta: scale of the reward.
        phrase_weight: weight of a changed token; 1 without `normalize` is DPO.
        normalize: average instead of sum.

    Raises:
        ValueError: if a response has no tokens.

    Source: thunlp/Muffin (85d72b4).
    """
    sides = ((chosen_mask, chosen_phrase_mask, "chosen"), (rejected_mask, rejected_phrase_mask, "rejected"))
    rewards = []
    for ratios, (mask, phrases, side) in zip(as_float(chosen_logratios, rejected_logratios), sides):
        tokens_of(mask, side)
        weights = 1 + (phrase_weight - 1) * phrases.to(ratios)  # (B, T)
        score = masked_sum(weights * ratios, mask)  # (B,)
        rewards.append(beta * (score / masked_sum(weights, mask) if normalize else score))
    chosen, rejected = rewards
    losses = -F.logsigmoid(chosen - rejected)
    return PreferenceLoss(losses, chosen.detach(), rejected.detach(), terms={"preference": losses.detach()})
