"""DPO on videos and images: the baseline (arXiv 2305.18290), and the losses of its family that TRL has.

Different from `trl.DPOTrainer`:

- rows may hold videos, and mixed text, image and video datasets train together;
- a rejected response may have media of its own (visual contrast): given in the row, or a corruption of the others;
- `sft` is a mean over the tokens of all micro-batches and ranks of an optimizer step, where TRL takes those of a
  micro-batch; of one batch both are the same;
- `logps/chosen` and `logps/rejected` are plain sums with `ld_alpha`, too;
- `dpop` is a loss type. What does nothing in TRL (`label_smoothing` of `sigmoid`) is refused.

`aot` and `aot_unpaired` compare sorted margins, as in TRL those of a micro-batch: they depend on how a batch is cut.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, minimum
from trl import DPOTrainer

from trl_vpo.losses import PreferenceLoss, dpo_sum_loss
from trl_vpo.losses.common import tokens_of
from trl_vpo.losses.dpo_sum import LOSS_TYPES
from trl_vpo.losses.dpo_variants import DIVERGENCES, ld_sums, wpo_weights
from trl_vpo.media.corruptions import CONTRASTS
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import NEVER
from trl_vpo.trainers.score_margins import ScoreMarginConfig

OPTIONS = {"label_smoothing": 0.0, "discopop_tau": 0.05, "penalty_weight": 50.0}  # of some types, and their defaults
SORTING = {"aot", "aot_unpaired"}
NOT_WEIGHTED = dict.fromkeys(SORTING, "sorts the pairs") | {"sft": "is a mean over tokens, not pairs"}


@dataclass(repr=False)
class VisualDPOConfig(ScoreMarginConfig):
    """Config of [`VisualDPOTrainer`]. `beta` (0.1) is TRL's."""

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"One or several losses, which are added up: {', '.join(LOSS_TYPES)}."},
    )
    loss_weights: list[float] | None = option(None, "Weights of several losses; all 1 by default.")
    label_smoothing: float = option(0.0, "Smoothing of robust, exo_pair and aot. Robust's paper has 0.1, EXO's 0.001.")
    ld_alpha: float | None = option(
        None, "LD-DPO: weight in [0, 1] of the tokens by which a response is longer than the other."
    )
    f_divergence_type: str = option("reverse_kl", "f-DPO: divergence to the reference.", choices=list(DIVERGENCES))
    f_alpha_divergence_coef: float = option(0.5, "Alpha of `alpha_divergence`: 0 is forward_kl, 1 is reverse_kl.")
    use_weighting: bool = option(False, "WPO: pairs that the policy finds likely weigh more.")
    discopop_tau: float = option(OPTIONS["discopop_tau"], "Temperature of discopop.")
    penalty_weight: float = option(OPTIONS["penalty_weight"], "Weight of the penalty of dpop.")
    media_contrast: str | None = option(
        None,
        "Corruption of the media of rejected responses, where a row gives none. Rows give them as `rejected_images` "
        "or `rejected_videos`. A row without `rejected` then compares the chosen response with itself. `shuffle`, "
        "`reverse` and `drop` are of frames, for rows with videos only.",
        choices=CONTRASTS,
    )
    anchor_weight: float = option(0.0, "Weight of mDPO's anchor, which keeps the chosen reward from falling.")

    media_form = "pair"
    refused = NEVER

    def __post_init__(self):
        super().__post_init__()
        types = self.loss_type
        if bad := [t for t in types if t not in LOSS_TYPES] or [t for t in types if types.count(t) > 1]:
            raise ValueError(f"loss_type has {bad[0]!r}: give some of {', '.join(LOSS_TYPES)}, each once.")
        if not types:
            raise ValueError(f"loss_type is empty: give some of {', '.join(LOSS_TYPES)}.")
        if self.loss_weights and not any(self.loss_weights):
            raise ValueError(f"loss_weights={self.loss_weights} trains nothing: give a weight above 0.")
        self._check_options()
        self._check_divergence()
        if self.score_scale_weight and SORTING & set(types):
            raise ValueError("score_scale_weight gives each pair a beta, but loss_type aot sorts the pairs. Drop one.")
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha={self.ld_alpha} is not in [0, 1].")
        if self.ld_alpha is not None and self.precompute_ref_log_probs:
            raise ValueError(
                "ld_alpha weighs tokens by a pair's lengths, and precomputed reference log-probs are sums over whole "
                "responses. Set precompute_ref_log_probs=False."
            )
        if self.use_weighting and (bad := [t for t in types if t in NOT_WEIGHTED]):
            raise ValueError(
                f"use_weighting=True weighs each pair's loss, but loss_type {bad[0]!r} {NOT_WEIGHTED[bad[0]]}. "
                "Leave one of them out."
            )

    def _check_options(self) -> None:
        """Refuse options that none of the types has, and values that they cannot have."""
        for name, default in OPTIONS.items():
            takers = [t for t, kind in LOSS_TYPES.items() if name in kind.options]
            if getattr(self, name) != default and not set(takers) & set(self.loss_type):
                raise ValueError(
                    f"{name}={getattr(self, name)} does nothing with loss_type {', '.join(self.loss_type)}: it "
                    f"belongs to {', '.join(takers)}. Leave `{name}` out, or choose one of these."
                )
        smoothing = self.label_smoothing
        if "robust" in self.loss_type and smoothing >= 0.5:
            raise ValueError(f"label_smoothing={smoothing}: loss_type 'robust' needs it below 0.5.")
        if "exo_pair" in self.loss_type and smoothing == 0.0:
            raise ValueError("loss_type 'exo_pair' is infinite without smoothing. Set label_smoothing: 0.001.")

    def _check_divergence(self) -> None:
        kind, alpha = self.f_divergence_type, self.f_alpha_divergence_coef
        if kind not in DIVERGENCES:
            raise ValueError(f"f_divergence_type={kind!r} is not one of {', '.join(DIVERGENCES)}.")
        if alpha != 0.5 and kind != "alpha_divergence":
            raise ValueError(f"f_alpha_divergence_coef={alpha} does nothing with f_divergence_type={kind!r}.")
        fit = [name for name, t in LOSS_TYPES.items() if t.any_divergence]
        if kind != "reverse_kl" and (bad := [t for t in self.loss_type if t not in fit]):
            raise ValueError(
                f"f_divergence_type={kind!r} has no meaning for loss_type {bad[0]!r}, which is not a function of the "
                f"difference of two rewards. Leave it out, or use {', '.join(fit)}."
            )


class VisualDPOTrainer(VisualPreferenceTrainer):
    """Direct preference optimization, `-logsigmoid(beta * (logratio of chosen - logratio of rejected))`, or a variant.

    Example:
        >>> trainer = VisualDPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=VisualDPOConfig("dpo-out", learning_rate=5e-6),
        ...     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = VisualDPOConfig
    _tag_names = ["trl", "trl-vpo", "dpo"]
    _name = "DPO"
    _paper = DPOTrainer._paper

    def _finish_init(self) -> None:
        super()._finish_init()
        self.scorer.squares = self.args.use_weighting

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        if SORTING & set(self.args.loss_type) and (batch["weights"] != 1).any():
            raise ValueError(
                "loss_type aot and aot_unpaired sort the pairs of a batch, so the `weight` of a row would be another "
                f"row's. Leave it out of the rows ({'; '.join(batch['names'])}), or use another loss."
            )
        args, totals, sides = self.args, batch.get("totals"), (batch["chosen"], batch["rejected"])
        tokens = [tokens_of(scores.mask[side], name) for side, name in zip(sides, ("chosen", "rejected"))]  # (B,) each
        out = dpo_sum_loss(
            self._of_sides(scores, sides, tokens),
            self._of_sides(reference, sides, tokens),
            tokens,
            scores.sums[batch["chosen"]],
            loss_type=args.loss_type,
            loss_weights=args.loss_weights,
            f_divergence_type=args.f_divergence_type,
            f_alpha_divergence_coef=args.f_alpha_divergence_coef,
            pair_weights=self._pair_weights(scores, sides) if args.use_weighting else None,
            tokens_per_pair=None if totals is None else totals[1] / totals[0],
            betas=args.betas(batch),
            beta=self.beta,
            **{name: getattr(args, name) for name in OPTIONS},
        )
        if args.anchor_weight:
            ratios = scores.sums[batch["chosen"]] - reference.sums[batch["chosen"]]
            anchor = -F.logsigmoid(self.beta * ratios)  # (B,)
            out.losses = out.losses + args.anchor_weight * anchor
            out.terms["anchor"] = anchor.detach()
        return out

    def _of_sides(self, scores, sides, tokens) -> list[Tensor]:
        """Return the log-probs of chosen and rejected responses, (B,) each."""
        if self.args.ld_alpha is None:
            return [scores.sums[side] for side in sides]
        shared = minimum(*tokens)
        return [ld_sums(scores.logps[side], scores.mask[side], shared, self.args.ld_alpha) for side in sides]

    @staticmethod
    def _pair_weights(scores, sides) -> Tensor:
        chosen, rejected = (wpo_weights(scores.logps[s], scores.log_sum_sq_probs[s], scores.mask[s]) for s in sides)
        return chosen * rejected

    @property
    def nll_term(self) -> tuple[str, float] | None:
        types = self.args.loss_type
        if "sft" not in types:
            return None
        return "loss/sft", (self.args.loss_weights or [1.0] * len(types))[types.index("sft")]
