"""RRPO: rewards on the phrases that differ, and an exact token-wise KL to the reference (arXiv 2504.12083).

Different from DPO: only the phrases in which the responses differ are rewarded, and a KL over the whole vocabulary
(`trl_vpo.forward.kl`) holds the policy at every token of the chosen response.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, rrpo_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig, without_precomputing


@dataclass(repr=False)
class RRPOConfig(VisualPreferenceConfig):
    """Config of [`RRPOTrainer`]. `beta` (0.1) scales the phrase reward; the paper has 0.1 to 0.9, by base model."""

    learning_rate: float = option(5e-6, "Initial learning rate; the paper's, with LoRA.")
    alpha: float = option(0.01, "Weight of the KL to the reference, summed over the chosen response's tokens.")

    refused = REFUSED | without_precomputing() | {"label_smoothing": "RRPO has no label smoothing"}


class RRPOTrainer(VisualPreferenceTrainer):
    """Reward on phrase tokens only, plus `alpha` times KL(reference || policy) over the chosen response.

    Example:
        >>> trainer = RRPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=RRPOConfig("rrpo-out", num_frames=16),
        ...     train_dataset=load_dataset("json", data_files="phrases.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = RRPOConfig
    needs_kl = True
    needs_phrases = True
    _tag_names = ["trl", "trl-vpo", "rrpo"]
    _name = "RRPO"
    _paper = {
        "title": "Self-Alignment of Large Video Language Models with Refined Regularized Preference Optimization",
        "id": "2504.12083",
        "key": "sarkar2025rrpo",
        "author": "Pritam Sarkar and Ali Etemad",
        "year": 2025,
        "booktitle": "Advances in Neural Information Processing Systems 38",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        chosen, rejected = batch["chosen"], batch["rejected"]
        ratios = scores.logps - reference.logps  # (S, T)
        return rrpo_loss(
            ratios[chosen],
            ratios[rejected],
            batch["phrase_mask"][chosen],
            batch["phrase_mask"][rejected],
            scores.kl[chosen],
            scores.mask[chosen],
            beta=self.beta,
            alpha=self.args.alpha,
        )
