"""SimPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, nll_per_pair, tokens_of


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float,
    target_margin: float,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    tokens_per_pair: Tensor | float | None = None,
) -> PreferenceLoss:
    """SimPO: average log-likelihoods with a margin, no reference (Meng et al., NeurIPS 2024, arXiv 2405.14734).

    `target_margin` is TRL's `simpo_gamma`; the authors' `gamma_beta_ratio` is that margin divided by beta. This is
    `leanpo_loss` with `symmetric_margin` and all pairs smoothed.

        avg(y) = sum of log pi over y / |y|                          reward(y) = beta * avg(y)
        u      = beta * (avg(y_w) - avg(y_l)) - target_margin
        pref   = -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)
        loss   = mean over pairs of pref + nll_weight * NLL(y_w)     NLL: the mean over all chosen tokens of the batch

    Args:
        chosen_logps: (B, T) log pi of each token of y_w.
        rejected_logps: (B, T') the same for y_l.
        chosen_mask: (B, T) true on the response's tokens.
        rejected_mask: (B, T').
        beta: scale of the reward.
        target_margin: what the margin of the rewards should exceed, in units of the reward.
        label_smoothing: weight of the swapped pair.
        nll_weight: weight of the negative log-likelihood of the chosen responses.
        tokens_per_pair: mean length of the chosen responses of the whole batch. None: the B pairs are the batch.

    Raises:
        ValueError: if a response has no tokens.

    Source: princeton-nlp/SimPO (1b3e8f3), and TRL's CPOTrainer.
    """
    chosen_logps, rejected_logps = as_float(chosen_logps, rejected_logps)
    chosen_tokens, rejected_tokens = tokens_of(chosen_mask, "chosen"), tokens_of(rejected_mask, "rejected")  # (B,)
    chosen_sums = masked_sum(chosen_logps, chosen_mask)  # (B,)
    chosen = beta * chosen_sums / chosen_tokens
    rejected = beta * masked_sum(rejected_logps, rejected_mask) / rejected_tokens
    u = chosen - rejected - target_margin
    preference = -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)
    nll = nll_per_pair(chosen_sums, chosen_tokens, tokens_per_pair)
    return PreferenceLoss(
        losses=preference + nll_weight * nll,
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
        terms={"preference": preference.detach(), "nll": nll.detach()},
    )
