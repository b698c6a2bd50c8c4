"""LeanPO: reference-free preference optimization by average log-likelihood (arXiv 2506.05260).

The paper's code was never released. From the first author's public trainer: the swapped term keeps the sign of the
margin, the weight of the smoothing carries no gradient, NLL is a mean over chosen tokens and not over pairs, and the
defaults of beta, margin, smoothing and NLL weight. Different from it:

- the symmetric margin is an option, and so is a beta that grows with the margin of a pair's scores;
- the recipes train LoRA (the paper trains the whole language model);
- NLL is averaged over the tokens of all micro-batches and ranks of an optimizer step, where the author's trainer takes
  those of a micro-batch. So a run does not depend on how its batch is cut; on one device with one micro-batch a step,
  both are the same.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, leanpo_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, without_reference
from trl_vpo.trainers.score_margins import ScoreMarginConfig


@dataclass(repr=False)
class LeanPOConfig(ScoreMarginConfig):
    """Config of [`LeanPOTrainer`]."""

    learning_rate: float = option(5e-7, "Initial learning rate; the paper's, for full fine-tuning. LoRA: 5e-6.")
    beta: float = option(2.0, "Scale of the reward, the average log-likelihood.")
    target_margin: float = option(0.5, "Margin that the scaled reward of chosen should have over rejected.")
    label_smoothing: float = option(0.1, "Smoothing of the pairs that the policy ranks wrongly, in [0, 1).")
    smoothing_threshold: float = option(0.0, "Pairs with a margin below it are ranked wrongly, nats per token.")
    nll_weight: float = option(0.5, "Weight of the negative log-likelihood of the chosen responses.")
    symmetric_margin: bool = option(False, "SimPO's sign of the margin in the swapped term.")

    refused = REFUSED | without_reference("LeanPO")


class LeanPOTrainer(VisualPreferenceTrainer):
    """Reward `beta * average log-likelihood`, smoothing of wrongly ranked pairs, no reference model at all.

    Example:
        >>> trainer = LeanPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=LeanPOConfig("leanpo-out", learning_rate=5e-6, num_frames=16),
        ...     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = LeanPOConfig
    needs_reference = False
    _tag_names = ["trl", "trl-vpo", "leanpo"]
    _name = "LeanPO"
    _paper = {
        "title": "LeanPO: Lean Preference Optimization for Likelihood Alignment in Video-LLMs",
        "id": "2506.05260",
        "key": "wang2025leanpo",
        "author": "Xiaodong Wang and Jinfa Huang and Li Yuan and Peixi Peng",
        "year": 2025,
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
            betas=self.args.betas(batch),
        )

    @property
    def nll_term(self) -> tuple[str, float]:
        return "loss/nll", self.args.nll_weight
