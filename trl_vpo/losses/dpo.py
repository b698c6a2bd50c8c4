"""DPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float


def dpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> PreferenceLoss:
    """Direct preference optimization, `-logsigmoid(beta * (chosen - rejected))` (Rafailov et al. 2023, eq. 7).

    Args:
        chosen_logratios: (B,) log pi(y_w) - log pi_ref(y_w), summed over the response's tokens.
        rejected_logratios: (B,) the same for y_l.
        beta: strength of the implicit KL constraint.
    """
    chosen_logratios, rejected_logratios = as_float(chosen_logratios, rejected_logratios)
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))  # (B,)
    return PreferenceLoss(
        losses=losses,
        chosen_rewards=beta * chosen_logratios.detach(),
        rejected_rewards=beta * rejected_logratios.detach(),
        terms={"preference": losses.detach()},
    )
