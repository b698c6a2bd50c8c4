"""TDPO: DPO with an exact token-wise KL on both sides (arXiv 2404.11999).

Different from the authors' code: TDPO2 is the default, as in the paper; their config trains TDPO1. Different from
RRPO: the KL stands inside of the sigmoid, and that of the rejected response is trained, too.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, tdpo_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig, without_precomputing

KL_SIDES = {"tdpo1": ("chosen", "rejected"), "tdpo2": ("rejected",)}  # with gradient


@dataclass(repr=False)
class TDPOConfig(VisualPreferenceConfig):
    """Config of [`TDPOTrainer`]. `beta` (0.1) is TRL's."""

    learning_rate: float = option(5e-6, "Initial learning rate; the authors', for full fine-tuning of text models.")
    variant: str = option(
        "tdpo2", "`tdpo1` trains the KL of both responses, `tdpo2` that of the rejected one.", choices=list(KL_SIDES)
    )
    alpha: float = option(0.5, "Weight of the KLs in `tdpo2`; `tdpo1` has none. 0: DPO.")

    refused = REFUSED | without_precomputing() | {"label_smoothing": "TDPO has no label smoothing"}

    def __post_init__(self):
        super().__post_init__()
        if self.variant == "tdpo1" and self.alpha != 0.5:
            raise ValueError(
                f"alpha={self.alpha} does nothing with variant tdpo1, whose KLs have no weight. Leave it out."
            )

    @property
    def kl_sides(self) -> tuple[str, ...]:
        return KL_SIDES[self.variant]


class TDPOTrainer(VisualPreferenceTrainer):
    """DPO whose margin is lowered by how much more the rejected response's distributions moved than the chosen one's.

    Example:
        >>> trainer = TDPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=TDPOConfig("tdpo-out", num_frames=16),
        ...     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = TDPOConfig
    needs_kl = True
    _tag_names = ["trl", "trl-vpo", "tdpo"]
    _name = "TDPO"
    _paper = {
        "title": "Token-level Direct Preference Optimization",
        "id": "2404.11999",
        "key": "zeng2024tdpo",
        "author": "Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang",
        "year": 2024,
        "booktitle": "International Conference on Machine Learning",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        sides = (batch["chosen"], batch["rejected"])
        parts = (scores.logps - reference.logps, scores.kl, scores.mask)  # (S, T) each
        args = self.args
        values = (part[side] for part in parts for side in sides)
        return tdpo_loss(*values, beta=self.beta, alpha=args.alpha, variant=args.variant)
