"""A weighted sum of losses of the DPO family, by their names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trl_vpo.losses import dpo_variants as variants
from trl_vpo.losses.common import PreferenceLoss, as_float, nll_per_pair
from trl_vpo.losses.dpo import dpo_loss
from trl_vpo.losses.dpop import dpop_loss


@dataclass(frozen=True)
class LossType:
    """A loss and what it takes."""

    compute: Callable[..., Any]
    of: str = "sums"  # its inputs, see `dpo_sum_loss`
    options: tuple[str, ...] = ("beta",)  # its other arguments
    any_divergence: bool = False  # of the difference of two scores, in which what another divergence adds cancels


SMOOTHED = ("beta", "label_smoothing")
LOSS_TYPES = {
    "sigmoid": LossType(dpo_loss, any_divergence=True),
    "hinge": LossType(variants.hinge_loss, any_divergence=True),
    "ipo": LossType(variants.ipo_loss, "means", any_divergence=True),
    "exo_pair": LossType(variants.exo_pair_loss, options=SMOOTHED, any_divergence=True),
    "nca_pair": LossType(variants.nca_pair_loss),
    "robust": LossType(variants.robust_loss, options=SMOOTHED, any_divergence=True),
    "bco_pair": LossType(variants.bco_pair_loss),
    "sppo_hard": LossType(variants.sppo_hard_loss),
    "aot": LossType(variants.aot_loss, "margins", SMOOTHED),
    "aot_unpaired": LossType(variants.aot_loss, options=SMOOTHED),
    "apo_zero": LossType(variants.apo_zero_loss),
    "apo_down": LossType(variants.apo_down_loss),
    "discopop": LossType(variants.discopop_loss, options=("beta", "discopop_tau"), any_divergence=True),
    "sft": LossType(nll_per_pair, "chosen", (), any_divergence=True),
    "sigmoid_norm": LossType(dpo_loss, "means", any_divergence=True),
    "dpop": LossType(dpop_loss, options=("beta", "penalty_weight")),
}


def dpo_sum_loss(
    policy: Sequence[Tensor],
    reference: Sequence[Tensor],
    tokens: Sequence[Tensor],
    chosen_sums: Tensor,
    *,
    loss_type: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    pair_weights: Tensor | None = None,
    tokens_per_pair: Tensor | float | None = None,
    betas: Tensor | None = None,
    **options: float,
) -> PreferenceLoss:
    """Sum of losses by name, each times its weight: `dpo_loss`, `dpop_loss` and those of `dpo_variants`.

    A type is given the scores of both responses ("sums"; f'(pi / pi_ref) of them under another divergence), the same
    per token ("means"), the margins of policy and reference ("margins"), or the likelihood of y_w ("chosen").
    `sigmoid_norm` is DPO per token (Tulu 3, arXiv 2411.15124), `sft` the NLL of y_w, a mean over tokens. MPO (arXiv
    2411.10442) is 0.8 * sigmoid + 0.2 * bco_pair + sft.

    Args:
        policy: log pi of y_w and of y_l, (B,) each, summed over the response's tokens (or by `ld_sums`).
        reference: log pi_ref of them, summed likewise.
        tokens: their lengths.
        chosen_sums: (B,) log pi of y_w, a plain sum, for `sft`.
        loss_type: keys of `LOSS_TYPES`.
        loss_weights: one for each type; all 1 by default.
        f_divergence_type: see `divergence_scores`.
        f_alpha_divergence_coef: alpha of the alpha-divergence.
        pair_weights: (B,) factors of the summed loss, as WPO's.
        tokens_per_pair: mean length of the chosen responses of the whole batch. None: the B pairs are the batch.
        betas: (B,) the place of `beta` in the types, for each pair. None: all have `beta`, as the rewards have anyway.
        options: `beta`, and what the types take.

    Returns:
        the reward is beta * (log pi - log pi_ref) whatever the types; `terms` has each type's loss, unweighted.
    """
    ratios = [p - r for p, r in zip(as_float(*policy), as_float(*reference))]  # (B,) each
    scores = [variants.divergence_scores(r, f_divergence_type, f_alpha_divergence_coef) for r in ratios]
    inputs = {
        "sums": scores,
        "means": [score / count for score, count in zip(scores, tokens)],
        "margins": [side[0] - side[1] for side in (as_float(*policy), as_float(*reference))],
        "chosen": [*as_float(chosen_sums), tokens[0], tokens_per_pair],
    }
    terms, given = {}, options if betas is None else options | {"beta": betas}
    for name in loss_type:
        kind = LOSS_TYPES[name]
        out = kind.compute(*inputs[kind.of], **{option: given[option] for option in kind.options})
        terms[name] = out.losses if isinstance(out, PreferenceLoss) else out
    losses = sum(weight * term for weight, term in zip(loss_weights or [1.0] * len(terms), terms.values()))
    return PreferenceLoss(
        losses=losses if pair_weights is None else pair_weights * losses,
        chosen_rewards=options["beta"] * ratios[0].detach(),
        rejected_rewards=options["beta"] * ratios[1].detach(),
        terms={name: term.detach() for name, term in terms.items()} | ({} if betas is None else {"beta": betas}),
    )
