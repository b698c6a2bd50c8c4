"""`prepare_dataset` as trainers call it."""

from datasets import Dataset

import trl_vpo
from trl_vpo.data.check import prepare_dataset


def prepare(rows, processor, folder, phrases=False, name="train", config=trl_vpo.VisualDPOConfig, **more):
    """The checked rows, for a training into `folder`."""
    args = config(str(folder / "out"), num_frames=8, use_cpu=True, bf16=False, **more)
    data = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    collator = trl_vpo.VisualDPOTrainer.make_collator(processor, args)
    return prepare_dataset(data, args, name=name, processing_class=processor, collator=collator, phrases=phrases)
