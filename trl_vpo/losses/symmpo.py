"""SymMPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float


def symmpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    other_logratios: Tensor,
    chosen_on_other: Tensor,
    other_on_other: Tensor,
    *,
    beta: float,
    pair_weight: float = 0.5,
    anchor_weight: float = 1.0,
    margin_weight: float = 1e-4,
    anchor_beta: float | None = None,
) -> PreferenceLoss:
    """SymMPO: two similar images whose good responses are each other's bad ones (Liu et al., NeurIPS 2025).

    The margin term is in squared nats and not scaled by beta, as in the authors' code, whose weight goes with it.

        r(y | m) = log pi(y | m) - log pi_ref(y | m)         images m, m'; y_w, y' good for them; y_l bad for m
        a        = r(y_w | m) - r(y' | m)                    b = r(y' | m') - r(y_w | m')
        dpo      = -logsigmoid(beta * (r(y_w | m) - r(y_l | m)))
        pair     = -logsigmoid(beta * a) - logsigmoid(beta * b)
        anchor   = -logsigmoid(beta * r(y_w | m)) - logsigmoid(anchor_beta * r(y' | m'))
        margin   = (a - b)^2
        loss     = dpo + pair_weight * pair + anchor_weight * anchor + margin_weight * margin

    Args:
        chosen_logratios: (B,) r(y_w | m), summed over the response's tokens.
        rejected_logratios: (B,) r(y_l | m).
        other_logratios: (B,) r(y' | m).
        chosen_on_other: (B,) r(y_w | m').
        other_on_other: (B,) r(y' | m').
        beta: scale of the rewards.
        pair_weight: weight of the symmetric pairs (lambda).
        anchor_weight: weight of both anchors (eta).
        margin_weight: weight of the margins' difference (gamma).
        anchor_beta: beta of the anchor on m'. None: `beta`.

    Source: arXiv 2506.11712; Liuwq-bit/SymMPO (a4a1a39).
    """
    values = as_float(chosen_logratios, rejected_logratios, other_logratios, chosen_on_other, other_on_other)
    chosen, rejected, other, chosen_there, other_there = values  # (B,) nats
    here, there = chosen - other, other_there - chosen_there
    dpo = -F.logsigmoid(beta * (chosen - rejected))
    pair = -F.logsigmoid(beta * here) - F.logsigmoid(beta * there)
    anchor = -F.logsigmoid(beta * chosen) - F.logsigmoid((beta if anchor_beta is None else anchor_beta) * other_there)
    margin = (here - there).square()
    return PreferenceLoss(
        losses=dpo + pair_weight * pair + anchor_weight * anchor + margin_weight * margin,
        chosen_rewards=beta * chosen.detach(),
        rejected_rewards=beta * rejected.detach(),
        terms={"dpo": dpo.detach(), "pair": pair.detach(), "anchor": anchor.detach(), "margin": margin.detach()},
    )
