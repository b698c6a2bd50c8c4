"""DPOP's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float


def dpop_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, penalty_weight: float
) -> PreferenceLoss:
    """DPOP (Smaug): DPO that punishes a chosen response for falling below the reference (arXiv 2402.13228, eq. 3).

    No code was published. The penalty stands inside of the sigmoid and is scaled by beta; some ports put it outside.
    Exactly at the reference it has no gradient, so that the first step is DPO's.

        penalty = max(0, log pi_ref(y_w) - log pi(y_w))
        loss    = -logsigmoid(beta * (r(y_w) - r(y_l) - penalty_weight * penalty))           reward(y) = beta * r(y)

    Args:
        chosen_logratios: (B,) r(y_w) = log pi(y_w) - log pi_ref(y_w), summed over the response's tokens.
        rejected_logratios: (B,) the same for y_l.
        beta: scale of the reward; 0.3 in the paper.
        penalty_weight: weight of the penalty; 50 in the paper. 0 gives DPO.

    Source: the paper (Pal et al. 2024); abacusai/smaug has no code.
    """
    chosen, rejected = as_float(chosen_logratios, rejected_logratios)
    penalty = F.relu(-chosen)  # (B,) nats
    losses = -F.logsigmoid(beta * (chosen - rejected - penalty_weight * penalty))
    return PreferenceLoss(
        losses=losses,
        chosen_rewards=beta * chosen.detach(),
        rejected_rewards=beta * rejected.detach(),
        terms={"preference": losses.detach(), "penalty": penalty.detach()},
    )
