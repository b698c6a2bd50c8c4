"""mDPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float


def mdpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    corrupted_logratios: Tensor,
    *,
    beta: float,
    dpo_weight: float = 1.0,
    conditional_weight: float = 1.0,
    anchor_weight: float = 1.0,
    anchor_margin: float = 0.0,
) -> PreferenceLoss:
    """mDPO: DPO, a contrast with a corrupted image, and an anchor (Wang et al., EMNLP 2024, arXiv 2406.11839).

    Different from the authors' code: policy and reference see the same corrupted image, as in the paper, where the
    code draws one for each call; and the weights and the anchor's margin are arguments. It is `lpoi_loss` with a list
    of two images.

        r(y | m)    = log pi(y | m) - log pi_ref(y | m)                   m the image, m~ the corrupted one
        dpo         = -logsigmoid(beta * (r(y_w | m) - r(y_l | m)))
        conditional = -logsigmoid(beta * (r(y_w | m) - r(y_w | m~)))      (gradient through both)
        anchor      = -logsigmoid(beta * r(y_w | m) - anchor_margin)
        loss        = dpo_weight * dpo + conditional_weight * conditional + anchor_weight * anchor

    Args:
        chosen_logratios: (B,) r(y_w | m), summed over the response's tokens.
        rejected_logratios: (B,) r(y_l | m).
        corrupted_logratios: (B,) r(y_w | m~).
        beta: scale of the rewards.
        dpo_weight: weight of the DPO term, 1 in the paper.
        conditional_weight: weight of the contrast of the images, 1 in the paper.
        anchor_weight: weight of the anchor, 1 in the paper.
        anchor_margin: what the chosen reward should exceed, in units of the reward; 0 in the paper.

    Source: luka-group/mDPO (2221bb3).
    """
    values = as_float(chosen_logratios, rejected_logratios, corrupted_logratios)
    chosen, rejected, corrupted = (beta * ratios for ratios in values)  # (B,)
    dpo = -F.logsigmoid(chosen - rejected)
    conditional = -F.logsigmoid(chosen - corrupted)
    anchor = -F.logsigmoid(chosen - anchor_margin)
    return PreferenceLoss(
        losses=dpo_weight * dpo + conditional_weight * conditional + anchor_weight * anchor,
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
        terms={"dpo": dpo.detach(), "conditional": conditional.detach(), "anchor": anchor.detach()},
    )
