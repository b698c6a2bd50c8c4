"""LPOI's loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_vpo.losses.common import PreferenceLoss, as_float


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
        list_weight: weight of the ranking, 1 in the paper.
        dpo_weight: weight of the pair, 1 in the paper.
        anchor_weight: weight of the anchor, 1 in the paper.

    Raises:
        ValueError: if a row has fewer than two images, or a gap in its list.
    """
    image_logratios, rejected_logratios = as_float(image_logratios, rejected_logratios)
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
