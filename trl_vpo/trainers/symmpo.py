"""SymMPO: two similar images whose good responses are each other's bad ones (arXiv 2506.11712).

Different from mDPO: the second image is a real one with a good response of its own. Each response is compared with the
other under its own image, so both sides of every comparison are behind the same image. One beta scales all terms; the
authors' code has a second one for the other image's anchor, with the same value in all of its scripts. Rows may have
videos in the place of images.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, symmpo_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig


@dataclass(repr=False)
class SymMPOConfig(VisualPreferenceConfig):
    """Config of [`SymMPOTrainer`]. `beta` (0.1) is TRL's."""

    learning_rate: float = option(5e-6, "Initial learning rate; the authors', for full fine-tuning of LLaVA-1.5.")
    pair_weight: float = option(0.5, "Weight of the two comparisons of both good responses, one for each image.")
    anchor_weight: float = option(1.0, "Weight of the anchors of both good responses, each on its own image.")
    margin_weight: float = option(
        1e-4, "Weight of the squared difference of the two comparisons' margins, in nats without beta."
    )

    media_form = "symmetric"
    refused = REFUSED | {"label_smoothing": "SymMPO has no label smoothing"}


class SymMPOTrainer(VisualPreferenceTrainer):
    """DPO on the image, each of two images' good responses against the other's, anchors, and equal margins.

    Example:
        >>> trainer = SymMPOTrainer(
        ...     "llava-hf/llava-1.5-7b-hf",
        ...     args=SymMPOConfig("symmpo-out"),
        ...     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = SymMPOConfig
    _tag_names = ["trl", "trl-vpo", "symmpo"]
    _name = "SymMPO"
    _paper = {
        "title": "Mitigating Hallucination Through Theory-Consistent Symmetric Multimodal Preference Optimization",
        "id": "2506.11712",
        "key": "liu2025symmpo",
        "author": "Wenqi Liu and Xuemeng Song and Jiaxi Li and Yinwei Wei and Na Zheng and Jianhua Yin and "
        "Liqiang Nie",
        "year": 2025,
        "booktitle": "Advances in Neural Information Processing Systems",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        ratios = scores.sums - reference.sums  # (S,)
        chosen, other = ratios[batch["image_branches"]], ratios[batch["other_branches"]]  # (B, 2), on both images
        return symmpo_loss(
            chosen[:, 0],
            ratios[batch["rejected"]],
            other[:, 0],
            chosen[:, 1],
            other[:, 1],
            beta=self.beta,
            pair_weight=self.args.pair_weight,
            anchor_weight=self.args.anchor_weight,
            margin_weight=self.args.margin_weight,
        )

    def extra_metrics(self, scores, reference, batch) -> dict:
        """Return the rewards of both good responses on both images."""
        rewards = self.beta * (scores.sums - reference.sums)
        named = {"image": rewards[batch["image_branches"]], "other": rewards[batch["other_branches"]]}  # (B, 2) each
        return {f"rewards/{name}/{k + 1}": values[:, k] for name, values in named.items() for k in range(2)}
