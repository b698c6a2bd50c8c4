"""A method of your own: override `preference_loss` of a trainer. Data, videos, layouts, ranks and logs stay the same.

This one is DPO with an anchor: -logsigmoid(beta * logratio of chosen) is added, so that the chosen response does not
become less likely than it was under the reference.

    python examples/custom_loss.py             # the small world: a CPU and a minute
"""

from dataclasses import dataclass, replace

import small_world
import torch.nn.functional as F
from datasets import load_dataset
from peft import LoraConfig

from trl_vpo import VisualDPOConfig, VisualDPOTrainer


@dataclass(repr=False)  # the config's own repr hides tokens
class AnchoredDPOConfig(VisualDPOConfig):
    """Config of `AnchoredDPOTrainer`."""

    anchor_weight: float = 1.0


class AnchoredDPOTrainer(VisualDPOTrainer):
    """DPO plus `anchor_weight` times an anchor on the chosen response."""

    config_class = AnchoredDPOConfig
    _name = "Anchored DPO"  # in messages and on the model card
    _tag_names = ["trl", "trl-vpo", "anchored-dpo"]

    def preference_loss(self, scores, reference, batch):
        # scores.sums: (S,) summed log-probs of all S responses of the batch; batch["chosen"]: (B,) which are chosen.
        dpo = super().preference_loss(scores, reference, batch)
        logratios = (scores.sums - reference.sums)[batch["chosen"]]  # (B,)
        anchor = -F.logsigmoid(self.beta * logratios)  # (B,)
        losses = dpo.losses + self.args.anchor_weight * anchor
        return replace(dpo, losses=losses, terms=dpo.terms | {"anchor": anchor.detach()})  # logged as loss/anchor


def main(output_dir: str = "outputs/custom-loss", max_steps: int = 20) -> AnchoredDPOTrainer:
    folder = small_world.write(f"{output_dir}/data")
    trainer = AnchoredDPOTrainer(
        model=str(small_world.BASE),
        args=AnchoredDPOConfig(
            output_dir=output_dir,
            anchor_weight=0.5,
            num_frames=8,
            learning_rate=1e-3,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=load_dataset("json", data_files=f"{folder}/train.jsonl", split="train"),
        peft_config=LoraConfig(target_modules="language"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
