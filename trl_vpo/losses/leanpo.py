"""LeanPO's loss."""

import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, nll_per_pair, tokens_of


def leanpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float,
    target_margin: float,
    label_smoothing: float,
    smoothing_threshold: float = 0.0,
    nll_weight: float = 0.0,
    symmetric_margin: bool = False,
    tokens_per_pair: Tensor | float | None = None,
    betas: Tensor | None = None,
) -> PreferenceLoss:
    """LeanPO: the reward is the average log-likelihood, no reference (Wang et al. 2025, arXiv 2506.05260).

        avg(y) = sum of log pi over y / |y|            d = avg(y_w) - avg(y_l)
        w      = label_smoothing where d < smoothing_threshold, else 0     (no gradient through w)
        pref   = -(1 - w) * logsigmoid(beta * d - target_margin) - w * logsigmoid(-beta * d - target_margin)
        loss   = mean over pairs of pref + nll_weight * NLL(y_w)

    NLL is the mean over all chosen tokens of the batch, as in the first author's public trainer. It is handed out
    per pair (weighted by B * |y_w| / all tokens), so that `losses.mean()` is exactly the loss above. Where the B pairs
    are a part of a larger batch, `tokens_per_pair` makes it the mean over all chosen tokens of that batch.

    Args:
        chosen_logps: (B, T) log pi of each token of y_w.
        rejected_logps: (B, T') the same for y_l.
        chosen_mask: (B, T) true on the response's tokens.
        rejected_mask: (B, T').
        beta: scale of the reward.
        target_margin: what `beta * d` should exceed (SimPO's gamma), in units of the reward.
        label_smoothing: weight of the swapped pair where the policy ranks the pair wrongly; 0 gives SimPO.
        smoothing_threshold: pairs with `d` below it count as wrongly ranked, nats per token.
        nll_weight: weight of the negative log-likelihood of the chosen responses.
        symmetric_margin: `+ target_margin` in the swapped term (SimPO's form). The author's code keeps the minus.
        tokens_per_pair: mean length of the chosen responses of the whole batch. None: the B pairs are the batch.
        betas: (B,) the place of `beta` in `pref`, for each pair. None: all have `beta`, which the rewards have anyway.

    Raises:
        ValueError: if a response has no tokens.
    """
    chosen_logps, rejected_logps = as_float(chosen_logps, rejected_logps)
    chosen_tokens, rejected_tokens = tokens_of(chosen_mask, "chosen"), tokens_of(rejected_mask, "rejected")  # (B,)
    chosen_sums = masked_sum(chosen_logps, chosen_mask)  # (B,)
    chosen_avg = chosen_sums / chosen_tokens
    rejected_avg = masked_sum(rejected_logps, rejected_mask) / rejected_tokens
    margin = chosen_avg - rejected_avg  # (B,) nats per token

    smoothing = label_smoothing * (margin.detach() < smoothing_threshold).to(margin)  # (B,)
    swapped_margin = target_margin if symmetric_margin else -target_margin
    scaled = (beta if betas is None else betas) * margin
    preference = -(1 - smoothing) * F.logsigmoid(scaled - target_margin)
    preference = preference - smoothing * F.logsigmoid(-scaled + swapped_margin)

    nll = nll_per_pair(chosen_sums, chosen_tokens, tokens_per_pair)
    return PreferenceLoss(
        losses=preference + nll_weight * nll,
        chosen_rewards=beta * chosen_avg.detach(),
        rejected_rewards=beta * rejected_avg.detach(),
        terms={"preference": preference.detach(), "nll": nll.detach(), "smoothing": smoothing}
        | ({} if betas is None else {"beta": betas}),
    )
