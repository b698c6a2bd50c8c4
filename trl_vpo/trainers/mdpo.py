"""mDPO: DPO, a contrast with a corrupted image, and an anchor (arXiv 2406.11839).

Different from the authors' code: policy and reference see the same corrupted image. It is drawn from the row's texts,
so it is the same in every epoch, on any machine and after a resume. The weights and the anchor's margin are options.
Different from LPOI: the second image is a random crop of the first, or another corruption, no box is needed, and the
list has two items. A row may have several images, and videos.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, mdpo_loss
from trl_vpo.media.corruptions import CONTRASTS
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig
from trl_vpo.trainers.lpoi import LPOITrainer


@dataclass(repr=False)
class MDPOConfig(VisualPreferenceConfig):
    """Config of [`MDPOTrainer`]. `beta` (0.1) is TRL's."""

    learning_rate: float = option(1e-5, "Initial learning rate; the paper's for Bunny-3B, with LoRA.")
    media_contrast: str = option(
        "crop",
        "Drawn second media. Rows may bring their own; `shuffle`, `reverse`, `drop`: videos.",
        choices=CONTRASTS,
    )
    dpo_weight: float = option(1.0, "Weight of the DPO term on the media themselves.")
    conditional_weight: float = option(1.0, "Weight of the contrast with corrupted media.")
    anchor_weight: float = option(1.0, "Weight of the anchor of the chosen response.")
    anchor_margin: float = option(0.0, "What the chosen reward should exceed.")

    media_form = "contrast"
    refused = REFUSED | {"label_smoothing": "mDPO has no label smoothing"}


class MDPOTrainer(VisualPreferenceTrainer):
    """DPO, the chosen response on the media against the same on a corrupted copy of them, and an anchor.

    Example:
        >>> trainer = MDPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=MDPOConfig("mdpo-out"),
        ...     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = MDPOConfig
    _tag_names = ["trl", "trl-vpo", "mdpo"]
    _name = "mDPO"
    _paper = {
        "title": "mDPO: Conditional Preference Optimization for Multimodal Large Language Models",
        "id": "2406.11839",
        "key": "wang2024mdpo",
        "author": "Fei Wang and Wenxuan Zhou and James Y. Huang and Nan Xu and Sheng Zhang and Hoifung Poon and "
        "Muhao Chen",
        "year": 2024,
        "booktitle": "Conference on Empirical Methods in Natural Language Processing",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        ratios = scores.sums - reference.sums  # (S,)
        return mdpo_loss(
            ratios[batch["chosen"]],
            ratios[batch["rejected"]],
            ratios[batch["image_branches"][:, 1]],
            beta=self.beta,
            dpo_weight=self.args.dpo_weight,
            conditional_weight=self.args.conditional_weight,
            anchor_weight=self.args.anchor_weight,
            anchor_margin=self.args.anchor_margin,
        )

    extra_metrics = LPOITrainer.extra_metrics
