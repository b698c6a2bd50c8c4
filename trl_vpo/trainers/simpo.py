"""SimPO: reference-free preference optimization with a margin (arXiv 2405.14734).

Different from LeanPO: no pair is smoothed by default, the margin changes its sign in the swapped term, and there is no
NLL unless `nll_weight` asks for it. The NLL is that of LeanPO: a mean over the chosen tokens of an optimizer step.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, simpo_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig, without_reference


@dataclass(repr=False)
class SimPOConfig(VisualPreferenceConfig):
    """Config of [`SimPOTrainer`]. The authors' `gamma_beta_ratio` is `target_margin / beta`."""

    learning_rate: float = option(
        5e-7, "Initial learning rate; the authors' are 3e-7 to 1e-6, for full fine-tuning. LoRA: 5e-6."
    )
    beta: float = option(2.0, "Scale of the reward, the average log-likelihood; the authors' are 2 to 10.")
    target_margin: float = option(0.5, "Margin that the scaled reward of chosen should have over rejected.")
    label_smoothing: float = option(0.0, "Smoothing of all pairs, in [0, 1).")
    nll_weight: float = option(0.0, "Weight of the negative log-likelihood of the chosen responses.")

    refused = REFUSED | without_reference("SimPO")


class SimPOTrainer(VisualPreferenceTrainer):
    """Reward `beta * average log-likelihood`, a target margin between the responses, no reference model at all.

    Example:
        >>> trainer = SimPOTrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=SimPOConfig("simpo-out", learning_rate=5e-6, num_frames=16),
        ...     train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = SimPOConfig
    needs_reference = False
    _tag_names = ["trl", "trl-vpo", "simpo"]
    _name = "SimPO"
    _paper = {
        "title": "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "id": "2405.14734",
        "key": "meng2024simpo",
        "author": "Yu Meng and Mengzhou Xia and Danqi Chen",
        "year": 2024,
        "booktitle": "Advances in Neural Information Processing Systems 37",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        chosen, rejected, totals = batch["chosen"], batch["rejected"], batch.get("totals")
        return simpo_loss(
            scores.logps[chosen],
            scores.logps[rejected],
            scores.mask[chosen],
            scores.mask[rejected],
            beta=self.beta,
            target_margin=self.args.target_margin,
            label_smoothing=self.args.label_smoothing,
            nll_weight=self.args.nll_weight,
            tokens_per_pair=None if totals is None else totals[1] / totals[0],
        )

    @property
    def nll_term(self) -> tuple[str, float]:
        return "loss/nll", self.args.nll_weight
