"""DPO on videos and images: the baseline (arXiv 2305.18290).

What differs from `trl.DPOTrainer`: rows may hold videos, and mixed text, image and video datasets train together.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, dpo_loss
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig


@dataclass(repr=False)
class VisualDPOConfig(VisualPreferenceConfig):
    """Config of [`VisualDPOTrainer`]. `beta` (0.1) is TRL's."""

    refused = REFUSED | {"label_smoothing": "the DPO loss here is the sigmoid loss without smoothing"}


class VisualDPOTrainer(VisualPreferenceTrainer):
    """Direct preference optimization, `-logsigmoid(beta * (logratio of chosen - logratio of rejected))`."""

    config_class = VisualDPOConfig
    _tag_names = ["trl", "trl-vpo", "dpo"]
    _name = "DPO"

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        ratios = scores.sums - reference.sums  # (S,)
        return dpo_loss(ratios[batch["chosen"]], ratios[batch["rejected"]], beta=self.beta)
