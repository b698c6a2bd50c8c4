"""DDPO: DPO in which the tokens that differ weigh more, RLHF-V's method (arXiv 2312.00849).

The defaults are the released recipe's: sums, beta 0.1, weight 1.1. The paper normalizes, with beta 0.5 and weight 5;
these coefficients belong together. Different from both: changed tokens are those of the row's phrases, as for RRPO,
where the code matches token ids and marks replaced words only.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, ddpo_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig, without_precomputing

TOKENS = "the reference's log-probs of each token are needed, not their sums only"


@dataclass(repr=False)
class DDPOConfig(VisualPreferenceConfig):
    """Config of [`DDPOTrainer`]. `beta` (0.1) is the released recipe's; with `normalize` the paper has 0.5."""

    learning_rate: float = option(5e-7, "Initial learning rate; the paper's, for full fine-tuning. LoRA: 5e-6.")
    phrase_weight: float = option(1.1, "Weight of a token in a phrase that differs; with `normalize` the paper has 5.")
    normalize: bool = option(False, "Divide each reward by the sum of its tokens' weights.")

    refused = REFUSED | without_precomputing(TOKENS) | {"label_smoothing": "DDPO has no label smoothing"}


class DDPOTrainer(VisualPreferenceTrainer):
    """DPO on log-ratios that are weighted by token: `phrase_weight` in phrases that differ, 1 elsewhere.

    Example:
        >>> trainer = DDPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=DDPOConfig("ddpo-out", learning_rate=5e-6),
        ...     train_dataset=load_dataset("json", data_files="corrections.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = DDPOConfig
    needs_phrases = True
    _tag_names = ["trl", "trl-vpo", "ddpo"]
    _name = "DDPO"
    _paper = {
        "title": "RLHF-V: Towards Trustworthy MLLMs via Behavior Alignment from Fine-grained Correctional Human "
        "Feedback",
        "id": "2312.00849",
        "key": "yu2024rlhfv",
        "author": "Tianyu Yu and Yuan Yao and Haoye Zhang and Taiwen He and Yifeng Han and Ganqu Cui and Jinyi Hu "
        "and Zhiyuan Liu and Hai-Tao Zheng and Maosong Sun and Tat-Seng Chua",
        "year": 2024,
        "booktitle": "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        sides = (batch["chosen"], batch["rejected"])
        parts = (scores.logps - reference.logps, scores.mask, batch["phrase_mask"])  # (S, T) each
        values = (part[side] for part in parts for side in sides)
        args = self.args
        return ddpo_loss(*values, beta=self.beta, phrase_weight=args.phrase_weight, normalize=args.normalize)
