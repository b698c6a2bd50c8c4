"""LPOI: a listwise ranking of images in which the critical object is more and more hidden (arXiv 2505.21061).

Different from DPO: a row has a list of images that show less and less of an object. The chosen response is scored on
each of them, and the more visible image should win; the rejected response is scored on the first. Different from the
paper: the list may be of clips, in which an object or a moment is hidden.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, lpoi_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig


@dataclass(repr=False)
class LPOIConfig(VisualPreferenceConfig):
    """Config of [`LPOITrainer`]. `beta` (0.1) is TRL's."""

    learning_rate: float = option(
        5e-6, "Initial learning rate; the paper's for Idefics2-8B (1e-6 for LLaVA-1.5), with LoRA."
    )
    num_images: int = option(
        5,
        "Length of the list drawn from a box or span, the clean image or clip included; at least 2. Rows with a list "
        "of their own keep its length.",
    )
    visual_prompt: bool = option(True, "Draw a red ellipse around the hidden part.")
    list_weight: float = option(1.0, "Weight of the ranking of the images.")
    dpo_weight: float = option(1.0, "Weight of the DPO term on the clean image.")
    anchor_weight: float = option(1.0, "Weight of the anchor of the chosen response.")

    media_form = "ranking"
    refused = REFUSED | {"label_smoothing": "LPOI has no label smoothing"}


class LPOITrainer(VisualPreferenceTrainer):
    """Plackett-Luce ranking of the images under the chosen response, plus DPO and an anchor on the clean image.

    Example:
        >>> trainer = LPOITrainer(
        ...     "HuggingFaceM4/idefics2-8b",
        ...     args=LPOIConfig("lpoi-out", num_images=5),
        ...     train_dataset=load_dataset("json", data_files="boxes.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = LPOIConfig
    _tag_names = ["trl", "trl-vpo", "lpoi"]
    _name = "LPOI"
    _paper = {
        "title": "LPOI: Listwise Preference Optimization for Vision Language Models",
        "id": "2505.21061",
        "key": "pesaranzadeh2025lpoi",
        "author": "Fatemeh Pesaran Zadeh and Yoojin Oh and Gunhee Kim",
        "year": 2025,
        "booktitle": "Annual Meeting of the Association for Computational Linguistics",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        ratios = scores.sums - reference.sums  # (S,)
        lists = batch["image_branches"]  # (B, N), -1 where a row's list is shorter
        return lpoi_loss(
            ratios[lists.clamp(min=0)],
            ratios[batch["rejected"]],
            beta=self.beta,
            image_mask=lists >= 0,
            list_weight=self.args.list_weight,
            dpo_weight=self.args.dpo_weight,
            anchor_weight=self.args.anchor_weight,
        )

    def extra_metrics(self, scores, reference, batch) -> dict:
        ratios, lists = scores.sums - reference.sums, batch["image_branches"]
        rewards = self.beta * ratios[lists.clamp(min=0)]  # (B, N)
        return {f"rewards/image/{k + 1}": (rewards[:, k], lists[:, k] >= 0) for k in range(lists.size(1))}
