"""The mathematics of the four methods, side by side.

Every function takes log-probabilities (natural logs) and gives a [`PreferenceLoss`]; the training loss is
`losses.mean()`. Nothing here knows about models, tokenizers or trainers. Inputs of any float dtype are computed in
float32 (float64 stays float64), because sums of hundreds of log-probabilities do not fit into bfloat16.

    function        paper                                reward of a response
    `dpo_loss`      arXiv 2305.18290, eq. 7              beta * (lp - lp_ref)
    `leanpo_loss`   arXiv 2506.05260                     beta * lp / tokens
    `rrpo_loss`     arXiv 2504.12083                     beta * sum over its phrases of (lp - lp_ref)
    `lpoi_loss`     arXiv 2505.21061                     beta * (lp - lp_ref), one per image
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PreferenceLoss:
    """The result of a preference loss for B pairs; all but `losses` is detached."""

    losses: Tensor  # (B,) with gradient; the training loss is `losses.mean()`
    chosen_rewards: Tensor  # (B,) nats times beta
    rejected_rewards: Tensor  # (B,) nats times beta
    terms: dict[str, Tensor] = field(default_factory=dict)  # (B,) parts of the loss by metric name, unweighted


def _float(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last dimension where `mask`; what lies outside (padding, even inf or nan) has no influence."""
    return values.masked_fill(~mask.bool(), 0.0).sum(-1)


def _tokens(mask: Tensor, side: str) -> Tensor:
    """(B,) tokens per response. A response without tokens has no reward: better an error than a silent zero."""
    counts = mask.bool().sum(-1)
    if (counts == 0).any():
        rows = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"{side} responses {rows} of the batch have no tokens: every response needs at least one.")
    return counts


def dpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> PreferenceLoss:
    """Direct preference optimization, `-logsigmoid(beta * (chosen - rejected))` (Rafailov et al. 2023, eq. 7).

    Args:
        chosen_logratios: (B,) log pi(y_w) - log pi_ref(y_w), summed over the response's tokens.
        rejected_logratios: (B,) the same for y_l.
        beta: strength of the implicit KL constraint.
    """
    chosen_logratios, rejected_logratios = _float(chosen_logratios, rejected_logratios)
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))  # (B,)
    return PreferenceLoss(
        losses=losses,
        chosen_rewards=beta * chosen_logratios.detach(),
        rejected_rewards=beta * rejected_logratios.detach(),
        terms={"preference": losses.detach()},
    )


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

    Raises:
        ValueError: if a response has no tokens.
    """
    chosen_logps, rejected_logps = _float(chosen_logps, rejected_logps)
    chosen_tokens, rejected_tokens = _tokens(chosen_mask, "chosen"), _tokens(rejected_mask, "rejected")  # (B,)
    chosen_sums = _masked_sum(chosen_logps, chosen_mask)  # (B,)
    chosen_avg = chosen_sums / chosen_tokens
    rejected_avg = _masked_sum(rejected_logps, rejected_mask) / rejected_tokens
    margin = chosen_avg - rejected_avg  # (B,) nats per token

    smoothing = label_smoothing * (margin.detach() < smoothing_threshold).to(margin)  # (B,)
    swapped_margin = target_margin if symmetric_margin else -target_margin
    preference = -(1 - smoothing) * F.logsigmoid(beta * margin - target_margin)
    preference = preference - smoothing * F.logsigmoid(-beta * margin + swapped_margin)

    if tokens_per_pair is None:
        tokens_per_pair = chosen_tokens.sum().to(chosen_sums) / len(chosen_tokens)
    nll = -chosen_sums / tokens_per_pair  # (B,), its mean over a batch is the mean over all of the batch's tokens
    return PreferenceLoss(
        losses=preference + nll_weight * nll,
        chosen_rewards=beta * chosen_avg.detach(),
        rejected_rewards=beta * rejected_avg.detach(),
        terms={"preference": preference.detach(), "nll": nll.detach(), "smoothing": smoothing},
    )


def rrpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_phrase_mask: Tensor,
    rejected_phrase_mask: Tensor,
    chosen_kl: Tensor,
    chosen_mask: Tensor,
    *,
    beta: float,
    alpha: float,
) -> PreferenceLoss:
    """RRPO: reward on the phrases that differ, plus a token-wise KL (Sarkar & Etemad 2025, arXiv 2504.12083).

        u    = beta * (sum over phrase tokens of y_w of logratio - the same over phrase tokens of y_l)
        loss = -logsigmoid(u) + alpha * sum over all tokens of y_w of KL(pi_ref || pi)

    The KL is a penalty, so it is added: the paper's formula, read literally, would reward divergence.

    Args:
        chosen_logratios: (B, T) log pi - log pi_ref of each token of y_w.
        rejected_logratios: (B, T') the same for y_l.
        chosen_phrase_mask: (B, T) true on the tokens of the phrases that differ.
        rejected_phrase_mask: (B, T').
        chosen_kl: (B, T) exact KL(pi_ref || pi) at each token of y_w, over the full vocabulary, in nats.
        chosen_mask: (B, T) true on all tokens of y_w.
        beta: scale of the reward.
        alpha: weight of the KL.

    Raises:
        ValueError: if neither response of a pair has a phrase token (the pair would have no preference term).
    """
    chosen_logratios, rejected_logratios, chosen_kl = _float(chosen_logratios, rejected_logratios, chosen_kl)
    bare = ~(chosen_phrase_mask.bool().any(-1) | rejected_phrase_mask.bool().any(-1))  # (B,)
    if bare.any():
        raise ValueError(
            f"pairs {bare.nonzero().flatten().tolist()} of the batch have no phrase tokens on either side: "
            "RRPO has nothing to reward there."
        )
    chosen_rewards = beta * _masked_sum(chosen_logratios, chosen_phrase_mask)  # (B,)
    rejected_rewards = beta * _masked_sum(rejected_logratios, rejected_phrase_mask)
    preference = -F.logsigmoid(chosen_rewards - rejected_rewards)
    kl = _masked_sum(chosen_kl, chosen_mask)  # (B,) nats per response
    return PreferenceLoss(
        losses=preference + alpha * kl,
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
        terms={"preference": preference.detach(), "kl": kl.detach()},
    )


def lpoi_loss(
    image_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    image_mask: Tensor | None = None,
    list_weight: float = 1.0,
    dpo_weight: float = 1.0,
    anchor_weight: float = 1.0,
) -> PreferenceLoss:
    """LPOI: a ranking of images in which the critical object is more and more hidden (arXiv 2505.21061).

        S_k    = beta * (log pi(y_w | x_k) - log pi_ref(y_w | x_k))                       x_1 hides nothing
        list   = sum over k = 1 .. N-1 of (logsumexp over j >= k of S_j - S_k)            Plackett-Luce
        dpo    = -logsigmoid(S_1 - beta * (log pi(y_l | x_1) - log pi_ref(y_l | x_1)))
        anchor = -logsigmoid(S_1)
        loss   = list_weight * list + dpo_weight * dpo + anchor_weight * anchor

    Args:
        image_logratios: (B, N) log-ratios of y_w, most visible image first, summed over the response's tokens.
        rejected_logratios: (B,) log-ratios of y_l on the first image.
        beta: scale of the scores.
        image_mask: (B, N) true where a row has an image; the true entries come first. None: all N.
        list_weight, dpo_weight, anchor_weight: weights of the three parts, 1 in the paper.

    Raises:
        ValueError: if a row has fewer than two images, or a gap in its list.
    """
    image_logratios, rejected_logratios = _float(image_logratios, rejected_logratios)
    mask = torch.ones_like(image_logratios, dtype=torch.bool) if image_mask is None else image_mask.bool()  # (B, N)
    lengths = mask.sum(-1)  # (B,)
    if (lengths < 2).any():
        rows = (lengths < 2).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of the batch have fewer than two images: there is nothing to rank.")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("image_mask has gaps: the images of a row must come first, its padding last.")

    scores = (beta * image_logratios).masked_fill(~mask, 0.0)  # (B, N)
    # Image k competes with the images j >= k of its row. Padding competes with itself only, which costs nothing and
    # keeps every logsumexp finite (an all -inf one would turn the gradients into nan).
    size = scores.size(-1)
    competes = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu() & mask.unsqueeze(1)  # (B, k, j)
    competes = competes | torch.eye(size, dtype=torch.bool, device=scores.device)
    rest = scores.unsqueeze(1).expand(-1, size, -1).masked_fill(~competes, -torch.inf).logsumexp(-1)  # (B, N)
    listwise = (rest - scores).sum(-1)  # (B,), the last image of a row adds nothing

    chosen_rewards, rejected_rewards = scores[:, 0], beta * rejected_logratios  # (B,)
    dpo = -F.logsigmoid(chosen_rewards - rejected_rewards)
    anchor = -F.logsigmoid(chosen_rewards)
    return PreferenceLoss(
        losses=list_weight * listwise + dpo_weight * dpo + anchor_weight * anchor,
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
        terms={"list": listwise.detach(), "dpo": dpo.detach(), "anchor": anchor.detach()},
    )
