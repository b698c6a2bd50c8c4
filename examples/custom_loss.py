"""A method of your own: override `preference_loss` of a trainer. Data, videos, layouts, ranks and logs stay the same.

This one is DPO with an offset (ODPO, arXiv 2402.10571): the chosen response has to win by a margin of its reward, and
not only win.

    python examples/custom_loss.py             # the small world: a CPU and a minute
"""

from dataclasses import dataclass

import small_world
import torch.nn.functional as F
from datasets import load_dataset
from peft import LoraConfig

from trl_vpo import VisualDPOConfig, VisualDPOTrainer
from trl_vpo.losses import PreferenceLoss


@dataclass(repr=False)  # the config's own repr hides tokens
class OffsetDPOConfig(VisualDPOConfig):
    """Config of `OffsetDPOTrainer`."""

    offset: float = 1.0


class OffsetDPOTrainer(VisualDPOTrainer):
    """DPO whose chosen reward has to be higher than the rejected one by `offset`."""

    config_class = OffsetDPOConfig
    _name = "Offset DPO"  # in messages and on the model card
    _tag_names = ["trl", "trl-vpo", "offset-dpo"]

    def preference_loss(self, scores, reference, batch):
        # scores.sums: (S,) summed log-probs of all S responses of the batch; batch["chosen"]: (B,) which are chosen.
        rewards = self.beta * (scores.sums - reference.sums)  # (S,)
        chosen, rejected = rewards[batch["chosen"]], rewards[batch["rejected"]]  # (B,) each
        losses = -F.logsigmoid(chosen - rejected - self.args.offset)
        terms = {"without_offset": -F.logsigmoid(chosen - rejected).detach()}  # logged as loss/without_offset
        return PreferenceLoss(losses, chosen.detach(), rejected.detach(), terms)


def main(output_dir: str = "outputs/custom-loss", max_steps: int = 20) -> OffsetDPOTrainer:
    folder = small_world.write(f"{output_dir}/data")
    trainer = OffsetDPOTrainer(
        model=str(small_world.BASE),
        args=OffsetDPOConfig(
            output_dir=output_dir,
            offset=0.5,
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
