"""A beta for each pair, which grows with the margin of the scores that its row has: MM-DPO (arXiv 2502.10391)."""

from dataclasses import dataclass

from torch import Tensor

from trl_vpo.losses.mmdpo import dynamic_beta
from trl_vpo.models.config import option
from trl_vpo.trainers.config import VisualPreferenceConfig


@dataclass(repr=False)
class ScoreMarginConfig(VisualPreferenceConfig):
    """The fields of methods that take scores."""

    score_scale_weight: float = option(
        0.0, "MM-DPO: a pair whose scores lie far apart has a beta larger by up to this share of it. 0: no scores."
    )
    score_sensitivity: float = option(0.5, "How fast beta grows with the margin of the scores.")
    score_columns: str = option(
        "score", "`chosen_score` and `rejected_score`, or LeanPO's `..._trust`.", choices=["score", "trust"]
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.score_scale_weight and (self.score_sensitivity != 0.5 or self.score_columns != "score"):
            raise ValueError("score_sensitivity and score_columns do nothing without score_scale_weight: set it, too.")

    @property
    def scores(self) -> str | None:
        """The columns that rows must have, None without a use for them."""
        return self.score_columns if self.score_scale_weight else None

    def betas(self, batch: dict) -> Tensor | None:
        """Return the betas of B pairs, (B,), or None where all have `beta`."""
        if not self.score_scale_weight:
            return None
        options = {"scale_weight": self.score_scale_weight, "sensitivity": self.score_sensitivity}
        return dynamic_beta(batch["score_margins"], beta=self.beta, **options)
