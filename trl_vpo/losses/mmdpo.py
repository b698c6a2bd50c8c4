"""MM-DPO's loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, nll_per_pair, tokens_of


def dynamic_beta(score_margins: Tensor, *, beta: float, scale_weight: float, sensitivity: float) -> Tensor:
    """Return beta_i, (B,), of [`mmdpo_loss`], without gradient.

    Raises:
        ValueError: if a score margin is not finite.
    """
    (margins,) = as_float(score_margins.detach())
    odd = ~margins.isfinite()
    if odd.any():
        raise ValueError(f"the scores of pairs {odd.nonzero().flatten().tolist()} of the batch are not finite.")
    return beta * (1 - scale_weight * torch.expm1(-sensitivity * margins.clamp(min=0)))


def mmdpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    score_margins: Tensor,
    chosen_logps: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float,
    scale_weight: float = 0.5,
    sensitivity: float = 0.5,
    nll_weight: float = 0.0,
    tokens_per_pair: Tensor | float | None = None,
) -> PreferenceLoss:
    """MM-DPO: DPO with a larger beta for pairs that a reward model tells apart (MM-RLHF, arXiv 2502.10391).

    Different from the authors' code: the scores do scale beta, as in the paper; as released, a random beta overwrites
    theirs. beta_i stays in [beta, (1 + scale_weight) * beta], where the code clamps it at 0.001 only.

        beta_i = beta * (1 + scale_weight * (1 - exp(-sensitivity * max(0, score(y_w) - score(y_l)))))
        pref   = -logsigmoid(beta_i * (r(y_w) - r(y_l)))                                     reward(y) = beta * r(y)
        loss   = mean over pairs of pref + nll_weight * NLL(y_w)     NLL: the mean over all chosen tokens of the batch

    Args:
        chosen_logratios: (B,) r(y_w) = log pi(y_w) - log pi_ref(y_w), summed over the response's tokens.
        rejected_logratios: (B,) the same for y_l.
        score_margins: (B,) score of y_w minus score of y_l, by an external reward model; no gradient.
        chosen_logps: (B, T) log pi of each token of y_w, for the NLL.
        chosen_mask: (B, T) true on the response's tokens.
        beta: scale of the reward, and the smallest beta_i.
        scale_weight: how much a clear pair's beta grows; 0 gives DPO.
        sensitivity: how fast it grows with the margin.
        nll_weight: weight of the negative log-likelihood of the chosen responses.
        tokens_per_pair: mean length of the chosen responses of the whole batch. None: the B pairs are the batch.

    Raises:
        ValueError: if a score margin is not finite, or a chosen response has no tokens.

    Source: Kwai-YuanQi/MM-RLHF (7c8af1d), and the paper's formula (Zhang et al., ICML 2025).
    """
    chosen, rejected, chosen_logps = as_float(chosen_logratios, rejected_logratios, chosen_logps)
    betas = dynamic_beta(score_margins, beta=beta, scale_weight=scale_weight, sensitivity=sensitivity)  # (B,)
    preference = -F.logsigmoid(betas * (chosen - rejected))
    nll = nll_per_pair(masked_sum(chosen_logps, chosen_mask), tokens_of(chosen_mask, "chosen"), tokens_per_pair)
    return PreferenceLoss(
        losses=preference + nll_weight * nll,
        chosen_rewards=beta * chosen.detach(),
        rejected_rewards=beta * rejected.detach(),
        terms={"preference": preference.detach(), "nll": nll.detach(), "beta": betas},
    )
