"""Losses of the DPO family under TRL's names, the divergences of f-DPO, and the weights of LD-DPO and WPO.

Each loss gives (B,) with gradient. Unless it says otherwise, `chosen` and `rejected` are the (B,) log-ratios
r(y) = log pi(y) - log pi_ref(y) of y_w and y_l, summed over the tokens of a response; where a loss is a function of
their difference alone, they may be the scores of another divergence. d = r(y_w) - r(y_l).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import masked_sum

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # TRL's for the alpha-divergence: in float32 its power still is finite


def hinge_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin: max(0, 1 - beta * d)."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (d - 1 / (2 * beta))^2, with beta the paper's tau.

    Args:
        chosen: (B,) log-ratio of y_w per token. The paper has sums; its authors and TRL average.
        rejected: (B,) the same for y_l.
        beta: strength of the regularization; the margin aimed at is 1 / (2 * beta) nats per token.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16): the reverse KL of two distributions over a pair.

    q = (sigmoid(beta * d), sigmoid(-beta * d)) is the model's, p = (1 - label_smoothing, label_smoothing) the wanted
    one; the loss is KL(q || p). The paper's smoothing is 0.001; with 0 the KL is infinite.
    """
    u = beta * (chosen - rejected)
    wins = u.sigmoid() * (F.logsigmoid(u) - math.log1p(-label_smoothing))
    return wins + (-u).sigmoid() * (F.logsigmoid(-u) - math.log(label_smoothing))


def nca_pair_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv 2402.05369): each response against the reference, not the other one.

    -logsigmoid(beta * r(y_w)) - 0.5 * logsigmoid(-beta * r(y_w)) - 0.5 * logsigmoid(-beta * r(y_l))
    """
    a, b = beta * chosen, beta * rejected
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def robust_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased where a share of the labels is flipped.

    (-(1 - e) * logsigmoid(beta * d) + e * logsigmoid(-beta * d)) / (1 - 2 * e), with e = label_smoothing < 0.5 the
    share. A loss below 0 is possible.
    """
    u, e = beta * (chosen - rejected), label_smoothing
    return (e * F.logsigmoid(-u) - (1 - e) * F.logsigmoid(u)) / (1 - 2 * e)


def bco_pair_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """BCO for pairs (Jung et al. 2024, arXiv 2404.04656): a classifier of good and bad responses, without its shift.

    -logsigmoid(beta * r(y_w)) - logsigmoid(-beta * r(y_l)). The paper subtracts the running mean of the rewards, TRL
    has none.
    """
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """SPPO with the label as win rate (Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with P of 1 and 0).

    (r(y_w) - 1 / (2 * beta))^2 + (r(y_l) + 1 / (2 * beta))^2
    """
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def aot_loss(margins: Tensor, reference_margins: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Alignment via optimal transport (Melnyk et al. 2024, arXiv 2406.05882): the margins as a distribution.

    Both are sorted, and entry i is compared with entry i: the loss at i is not that of row i, and depends on which
    pairs are in the B. With B = 1 and no smoothing it is DPO.

        u = beta * (sort(margins) - sort(reference_margins))
        L = -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)

    Args:
        margins: (B,) log pi(y_w) - log pi(y_l) of the policy; without pairs (`aot_unpaired`), r(y_w).
        reference_margins: (B,) the same of the reference; without pairs, r(y_l).
        beta: scale of the margins.
        label_smoothing: weight of the swapped comparison.
    """
    u = beta * (margins.sort().values - reference_margins.sort().values)
    return -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): chosen up, rejected down.

    1 - sigmoid(beta * r(y_w)) + sigmoid(beta * r(y_l)). For chosen responses that are better than the model's own.
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): both down, the rejected more.

    sigmoid(beta * r(y_w)) + 1 - sigmoid(beta * d). For chosen responses that are worse than the model's own.
    """
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def discopop_loss(chosen: Tensor, rejected: Tensor, *, beta: float, discopop_tau: float) -> Tensor:
    """DiscoPOP (Lu et al. 2024, arXiv 2406.08414, eq. 5): a blend of the logistic and the exponential loss.

    u = beta * d, g = sigmoid(u / tau):  -(1 - g) * logsigmoid(u) + g * exp(-u). The paper's tau is 0.05. The second
    term is computed as one exponential: apart, its factors overflow and vanish on pairs that are ranked wrongly.
    """
    u = beta * (chosen - rejected)
    exponential = (F.logsigmoid(u / discopop_tau) - u).exp()
    return exponential - (-u / discopop_tau).sigmoid() * F.logsigmoid(u)


def divergence_scores(logratios: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """f-DPO (Wang et al. 2023, arXiv 2309.16240): what stands in the place of r(y) under another divergence, f'(t).

    With t = pi(y) / pi_ref(y), and up to constants that cancel in a difference:

        reverse_kl        log t                               (DPO)
        forward_kl        1 - 1 / t                           (the alpha-divergence with alpha 0)
        js_divergence     log(2 t / (1 + t))
        alpha_divergence  (t^(alpha - 1) - 1) / (alpha - 1)   (with alpha 1: log t)

    The powers are cut off at exp(80), where they have no gradient.
    """
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": alpha - 1}[divergence]
    if abs(power) < 1e-6:
        return logratios
    return (power * logratios).clamp(max=LARGEST_EXPONENT).expm1() / power


def ld_sums(logps: Tensor, mask: Tensor, shared_tokens: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO (Liu et al. 2024, arXiv 2409.06411): (B,) sums in which the longer response's surplus weighs less.

    The tokens behind the length of the shorter response, `shared_tokens` (B,), weigh `ld_alpha`, all others 1.
    """
    surplus = mask.cumsum(-1) > shared_tokens.unsqueeze(-1)  # (B, T)
    return masked_sum(logps * torch.where(surplus, ld_alpha, 1.0).to(logps), mask)


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO (Zhou et al. 2024, arXiv 2406.11827, eq. 2): (B,) how near each response is to what the policy would say.

    The geometric mean over its tokens of pi(y_t) / sum over the vocabulary of pi(v)^2. A pair's loss is multiplied
    by the weights of both responses, which carry no gradient. A weight may exceed 1, as in TRL 1.16.
    """
    return (masked_sum(logps - log_sum_sq_probs, mask) / mask.sum(-1)).exp().detach()
