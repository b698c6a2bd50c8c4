"""LeanPO: reference-free preference optimization by average log-likelihood (arXiv 2506.05260).

The paper's code was never released. From the first author's public trainer: the swapped term keeps the sign of the
margin, the weight of the smoothing carries no gradient, NLL is a mean over chosen tokens and not over pairs, and the
defaults of beta, margin, smoothing and NLL weight. Ours: the symmetric margin as an option, LoRA in the recipes (the
paper trains the whole language model), and which tokens NLL is averaged over. The author's trainer takes those of a
micro-batch; here they are those of all micro-batches and ranks of an optimizer step, so that a run does not depend on
how its batch is cut. With one micro-batch a step on one device, both are the same.
"""

import textwrap
from dataclasses import dataclass, field

from trl_vpo.losses import PreferenceLoss, leanpo_loss
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig
from trl_vpo.trainers.logs import PAIRWISE

REASON = "LeanPO has no reference model"


@dataclass(repr=False)
class LeanPOConfig(VisualPreferenceConfig):
    """Config of [`LeanPOTrainer`].

    Parameters:
        beta (`float`, defaults to 2.0): scale of the reward, the average log-likelihood.
        target_margin (`float`, defaults to 0.5): margin that the scaled reward of chosen should have over rejected.
        label_smoothing (`float`, defaults to 0.1): smoothing of the pairs that the policy ranks wrongly, in [0, 1).
        smoothing_threshold (`float`, defaults to 0.0): pairs with a margin below it are ranked wrongly, nats/token.
        nll_weight (`float`, defaults to 0.5): weight of the negative log-likelihood of the chosen responses.
        symmetric_margin (`bool`, defaults to `False`): SimPO's sign of the margin in the swapped term.
        learning_rate (`float`, defaults to 5e-7): the paper's, for full fine-tuning.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate for AdamW."})
    beta: float = field(default=2.0, metadata={"help": "Scale of the reward, the average log-likelihood."})
    target_margin: float = field(default=0.5, metadata={"help": "Margin of the scaled reward, chosen over rejected."})
    label_smoothing: float = field(default=0.1, metadata={"help": "Smoothing of pairs that are ranked wrongly."})
    smoothing_threshold: float = field(default=0.0, metadata={"help": "Margins below it are wrong, nats per token."})
    nll_weight: float = field(default=0.5, metadata={"help": "Weight of the chosen responses' NLL."})
    symmetric_margin: bool = field(default=False, metadata={"help": "SimPO's margin sign in the swapped term."})

    refused = REFUSED | dict.fromkeys(
        (
            "sync_ref_model",
            "ref_model_mixup_alpha",
            "ref_model_sync_steps",
            "precompute_ref_log_probs",
            "precompute_ref_batch_size",
        ),
        REASON,
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} is not in [0, 1).")


class LeanPOTrainer(VisualPreferenceTrainer):
    """Reward `beta * average log-likelihood`, smoothing of wrongly ranked pairs, no reference model at all."""

    config_class = LeanPOConfig
    needs_reference = False
    _tag_names = ["trl", "trl-vpo", "leanpo"]
    _name = "LeanPO"
    _paper = {
        "title": "LeanPO: Lean Preference Optimization for Likelihood Alignment in Video-LLMs",
        "id": "2506.05260",
        "citation": textwrap.dedent("""\
            @article{wang2025leanpo,
                title   = {{LeanPO: Lean Preference Optimization for Likelihood Alignment in Video-LLMs}},
                author  = {Xiaodong Wang and Jinfa Huang and Li Yuan and Peixi Peng},
                year    = 2025,
                journal = {arXiv preprint arXiv:2506.05260}
            }"""),
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        chosen, rejected, totals = batch["chosen"], batch["rejected"], batch.get("totals")
        return leanpo_loss(
            scores.logps[chosen],
            scores.logps[rejected],
            scores.mask[chosen],
            scores.mask[rejected],
            beta=self.beta,
            target_margin=self.args.target_margin,
            label_smoothing=self.args.label_smoothing,
            smoothing_threshold=self.args.smoothing_threshold,
            nll_weight=self.args.nll_weight,
            symmetric_margin=self.args.symmetric_margin,
            tokens_per_pair=None if totals is None else totals[1] / totals[0],
        )

    def extra_metrics(self, scores, reference, batch) -> dict:
        """The NLL per token: the average in the logs is over all tokens, however they fell into micro-batches."""
        tokens = scores.mask[scores.chosen].sum(-1)  # (B,)
        return {"loss/nll": (-scores.sums[scores.chosen] / tokens, tokens)}

    def _exact_loss(self, averages: dict[str, float]) -> float:
        """The loss with the NLL of all tokens in the place of its mean over pairs, for which each step has its own."""
        loss, pairwise = averages["loss"], averages.get(PAIRWISE + "loss/nll")
        return loss if pairwise is None else loss + self.args.nll_weight * (averages["loss/nll"] - pairwise)
