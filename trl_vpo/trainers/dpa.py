"""DPA: contrast paired phrases of both responses, hold the rest by a KL; HALVA's method (arXiv 2405.18654).

Different from the authors' code: phrases are averaged over their own row, as in the paper, so that a run does not
depend on how its batch is cut. The KL is taken on the pair's own chosen response; the authors take it on a response of
the base model's instruction tuning data. Different from RRPO: the rewards have no reference and no beta.
"""

from dataclasses import dataclass

from trl_vpo.losses import PreferenceLoss, dpa_loss
from trl_vpo.models.config import option
from trl_vpo.trainers.base import VisualPreferenceTrainer
from trl_vpo.trainers.config import REFUSED, VisualPreferenceConfig, without_precomputing


@dataclass(repr=False)
class DPAConfig(VisualPreferenceConfig):
    """Config of [`DPATrainer`]. There is no beta: `alpha` alone holds the policy to the reference."""

    learning_rate: float = option(5e-6, "Initial learning rate; the paper's, with LoRA.")
    alpha: float = option(0.4, "Weight of the KL to the reference, summed over the chosen response's tokens.")

    refused = REFUSED | without_precomputing()
    refused |= {"label_smoothing": "DPA has no label smoothing", "beta": "DPA's rewards are not scaled"}


class DPATrainer(VisualPreferenceTrainer):
    """Each phrase of the chosen response against its counterpart, plus `alpha` times KL(reference || policy).

    Example:
        >>> trainer = DPATrainer(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct",
        ...     args=DPAConfig("dpa-out"),
        ...     train_dataset=load_dataset("json", data_files="phrases.jsonl", split="train"),
        ...     peft_config=LoraConfig(target_modules="language"),
        ... )
        >>> trainer.train()
    """

    config_class = DPAConfig
    needs_kl = True
    needs_phrases = "paired"
    _tag_names = ["trl", "trl-vpo", "dpa"]
    _name = "DPA"
    _paper = {
        "title": "Data-augmented Phrase-level Alignment for Mitigating Object Hallucination",
        "id": "2405.18654",
        "key": "sarkar2025halva",
        "author": "Pritam Sarkar and Sayna Ebrahimi and Ali Etemad and Ahmad Beirami and Sercan O. Arik and Tomas "
        "Pfister",
        "year": 2025,
        "booktitle": "International Conference on Learning Representations",
    }

    def preference_loss(self, scores, reference, batch) -> PreferenceLoss:
        chosen, sides = batch["chosen"], (batch["chosen"], batch["rejected"])
        values = (part[side] for part in (scores.logps, batch["phrase_ids"]) for side in sides)
        return dpa_loss(*values, scores.kl[chosen], scores.mask[chosen], alpha=self.args.alpha)
