"""DPO on videos and images: the baseline (arXiv 2305.18290).

Different from `trl.DPOTrainer`: rows may hold videos, and mixed text, image and video datasets train together. A
rejected response may have media of its own (visual contrast): given in the row, or a corruption of the chosen ones.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from trl import DPOTrainer

from trl_vpo.losses import PreferenceLoss, dpo_loss
from trl_vpo.media.corruptions import CONTRASTS
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig


@dataclass(repr=False)
class VisualDPOConfig(VisualPreferenceConfig):
    """Config of [`VisualDPOTrainer`]. `beta` (0.1) is TRL's.

    Example:
        >>> args = VisualDPOConfig("dpo-out", num_frames=16, precompute_ref_log_probs=True)
    """

    media_contrast: str | None = option(
        None,
        "Score rejected responses behind a corruption of the row's media, where the row gives no `rejected_images` or "
        "`rejected_videos`. A row without `rejected` then compares the chosen response with itself. `shuffle`, "
        "`reverse` and `drop` are of frames, for rows with videos only.",
        choices=CONTRASTS,
    )
    anchor_weight: float = option(0.0, "Weight of mDPO's anchor, which keeps the chosen reward from falling.")

    media_form = "pair"
    refused = REFUSED | {"label_smoothing": "the DPO loss here is the sigmoid loss without smoothing"}


class VisualDPOTrainer(VisualPreferenceTrainer):
    """Direct preference optimization, `-logsigmoid(beta * (logratio of chosen - logratio of rejected))`.

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

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        ratios = scores.sums - reference.sums  # (S,)
        out = dpo_loss(ratios[batch["chosen"]], ratios[batch["rejected"]], beta=self.beta)
        if self.args.anchor_weight:
            anchor = -F.logsigmoid(self.beta * ratios[batch["chosen"]])  # (B,)
            out.losses = out.losses + self.args.anchor_weight * anchor
            out.terms["anchor"] = anchor.detach()
        return out
