"""RRPO: rewards on the phrases that differ, and an exact token-wise KL to the reference (arXiv 2504.12083)."""

import textwrap
from dataclasses import dataclass, field

from trl_vpo.losses import PreferenceLoss, rrpo_loss
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig

WHOLE = "the KL needs the reference's whole next-token distributions, not log-probs only"


@dataclass(repr=False)
class RRPOConfig(VisualPreferenceConfig):
    """Config of [`RRPOTrainer`].

    Parameters:
        alpha (`float`, defaults to 0.01): weight of the KL, which is summed over the chosen response's tokens.
        beta (`float`, defaults to 0.1): scale of the phrase reward (the paper: 0.1 to 0.9, by base model).
        learning_rate (`float`, defaults to 5e-6): the paper's, with LoRA.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    alpha: float = field(default=0.01, metadata={"help": "Weight of the token-wise KL to the reference."})

    refused = REFUSED | {
        "label_smoothing": "RRPO has no label smoothing",
        "precompute_ref_log_probs": WHOLE,
        "precompute_ref_batch_size": WHOLE,
    }


class RRPOTrainer(VisualPreferenceTrainer):
    """Reward on phrase tokens only, plus `alpha` times KL(reference || policy) over the chosen response."""

    config_class = RRPOConfig
    needs_kl = True
    needs_phrases = True
    _tag_names = ["trl", "trl-vpo", "rrpo"]
    _name = "RRPO"
    _paper = {
        "title": "Self-Alignment of Large Video Language Models with Refined Regularized Preference Optimization",
        "id": "2504.12083",
        "citation": textwrap.dedent("""\
            @inproceedings{sarkar2025rrpo,
                title     = {{Self-Alignment of Large Video Language Models with
                              Refined Regularized Preference Optimization}},
                author    = {Pritam Sarkar and Ali Etemad},
                year      = 2025,
                booktitle = {Advances in Neural Information Processing Systems 38}
            }"""),
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
