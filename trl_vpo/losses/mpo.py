"""MPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, nll_per_pair, tokens_of


def mpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_logps: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    nll_weight: float = 1.0,
    reward_shift: Tensor | float = 0.0,
    tokens_per_pair: Tensor | float | None = None,
) -> PreferenceLoss:
    """MPO: DPO, BCO and NLL together (InternVL, Wang et al. 2024, arXiv 2411.10442).

    Different from the paper: `reward_shift` is 0 by default, as in TRL since 0.29, where the paper and InternVL's code
    take the running mean of the rewards; and NLL is a mean over tokens, as in both codes, where the paper averages
    each response.

        preference = -logsigmoid(a - b)                              a = beta * r(y_w), b = beta * r(y_l)
        quality    = -logsigmoid(a - reward_shift) - logsigmoid(-(b - reward_shift))
        loss       = preference_weight * preference + quality_weight * quality + nll_weight * NLL(y_w)

    Args:
        chosen_logratios: (B,) r(y_w) = log pi(y_w) - log pi_ref(y_w), summed over the response's tokens.
        rejected_logratios: (B,) the same for y_l.
        chosen_logps: (B, T) log pi of each token of y_w, for the NLL: the mean over all chosen tokens of the batch.
        chosen_mask: (B, T) true on the response's tokens.
        beta: scale of the rewards.
        preference_weight: weight of the DPO term.
        quality_weight: weight of the quality term, which is a sum of its two sides.
        nll_weight: weight of the negative log-likelihood of the chosen responses.
        reward_shift: what a chosen reward should exceed and a rejected one not reach; carries no gradient.
        tokens_per_pair: mean length of the chosen responses of the whole batch. None: the B pairs are the batch.

    Raises:
        ValueError: if a chosen response has no tokens.

    Source: OpenGVLab/InternVL (2410d1d), and TRL 1.16.
    """
    chosen_logratios, rejected_logratios, chosen_logps = as_float(chosen_logratios, rejected_logratios, chosen_logps)
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios  # (B,)
    preference = -F.logsigmoid(chosen - rejected)
    quality = -F.logsigmoid(chosen - reward_shift) - F.logsigmoid(reward_shift - rejected)
    nll = nll_per_pair(masked_sum(chosen_logps, chosen_mask), tokens_of(chosen_mask, "chosen"), tokens_per_pair)
    return PreferenceLoss(
        losses=preference_weight * preference + quality_weight * quality + nll_weight * nll,
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
        terms={"preference": preference.detach(), "quality": quality.detach(), "nll": nll.detach()},
    )
