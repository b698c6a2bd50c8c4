"""DPA's loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float, masked_sum, tokens_of


def dpa_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_phrases: Tensor,
    rejected_phrases: Tensor,
    anchor_kl: Tensor,
    anchor_mask: Tensor,
    *,
    alpha: float,
) -> PreferenceLoss:
    """DPA: contrast paired phrases, and hold an anchor response (HALVA, Sarkar et al., ICLR 2025, arXiv 2405.18654).

    Different from the authors' code: phrases are averaged over their own row, as in the paper, where the code averages
    over the micro-batch, so that a row's phrases weigh less beside a row with more; and `softplus`, where
    `log(1 + exp(z))` overflows.

        lp_i(y)   = sum of log pi over the tokens of phrase i
        alignment = mean over the row's phrases of softplus(lp_i(y_l) - lp_i(y_w))
        kl        = sum over all tokens of the anchor response of KL(pi_ref || pi)
        loss      = alignment + alpha * kl                                reward(y) = sum of lp_i(y) over its phrases

    Args:
        chosen_logps: (B, T) log pi of each token of y_w. There is no beta and no reference in the rewards.
        rejected_logps: (B, T') the same for y_l.
        chosen_phrases: (B, T) whole numbers: i = 1 .. N on the tokens of phrase i, 0 elsewhere. N may differ by row.
        rejected_phrases: (B, T') the same; phrase i of y_l is the counterpart of phrase i of y_w.
        anchor_kl: (B, T'') exact KL(pi_ref || pi) at each token of the anchor, which may be y_w, in nats.
        anchor_mask: (B, T'') true on all tokens of the anchor.
        alpha: weight of the KL.

    Raises:
        ValueError: if phrases are not paired, a phrase has no token, or an anchor none.

    Source: pritamqu/HALVA (059b086).
    """
    tokens_of(anchor_mask, "anchor")
    chosen_logps, rejected_logps, anchor_kl = as_float(chosen_logps, rejected_logps, anchor_kl)
    counts = _count_phrases(chosen_phrases, rejected_phrases)  # (B,)
    width = int(counts.max())
    chosen, rejected = (
        _sum_phrases(*side, width) for side in ((chosen_logps, chosen_phrases), (rejected_logps, rejected_phrases))
    )  # (B, N)
    paired = torch.arange(width, device=counts.device) < counts.unsqueeze(1)  # (B, N)
    alignment = masked_sum(F.softplus(rejected - chosen), paired) / counts  # (B,)
    kl = masked_sum(anchor_kl, anchor_mask)  # (B,) nats per response
    return PreferenceLoss(
        losses=alignment + alpha * kl,
        chosen_rewards=chosen.sum(-1).detach(),
        rejected_rewards=rejected.sum(-1).detach(),
        terms={"alignment": alignment.detach(), "kl": kl.detach()},
    )


def _count_phrases(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,) pairs of phrases in each row."""
    counts, others = (ids.amax(-1) for ids in (chosen, rejected))
    for row, (count, other) in enumerate(zip(counts.tolist(), others.tolist())):
        wanted, sides = set(range(1, count + 1)), [set(ids[row].tolist()) - {0} for ids in (chosen, rejected)]
        if count < 1 or count != other:
            raise ValueError(
                f"row {row} of the batch has {count} phrases in the chosen and {other} in the rejected response: "
                "they are compared in pairs, and there must be one."
            )
        if sides != [wanted, wanted]:
            raise ValueError(f"row {row} of the batch has a phrase without tokens, of {count} on each side.")
    return counts


def _sum_phrases(logps: Tensor, ids: Tensor, width: int) -> Tensor:
    """(B, N) sums over the tokens of each phrase; what is in none (padding, even inf or nan) has no influence."""
    sums = logps.new_zeros(len(logps), width + 1)
    return sums.scatter_add(1, ids.long(), logps.masked_fill(ids == 0, 0.0))[:, 1:]
