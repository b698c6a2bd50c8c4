"""Two short steps of `VisualDPOTrainer`, called as TRL's tests call `DPOTrainer`, and what they moved."""

import math

import torch
import trl
from datasets import Dataset
from step_kit import assert_same_gradients, gradients, losses_of, snapshot
from trainer_kit import INIT, QUIET, collated, shake

from trl_vpo import VisualDPOConfig, VisualDPOTrainer

SHORT = QUIET | {"learning_rate": 0.1, "lr_scheduler_type": "linear"}


def trainer_on(model, rows, folder, **more):
    """`more`: arguments of the trainer or fields of its config; `rows`: a list of them, or a data set."""
    init = {key: more.pop(key) for key in (*INIT, "processing_class", "quantization_config") if key in more}
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = VisualDPOConfig(str(folder), **{**SHORT, **more})
    return VisualDPOTrainer(model, args=args, train_dataset=data, **init)


def assert_same_as_trl(trainer, rows, folder, **more):
    """Loss and gradients of `trl.DPOTrainer` on the same rows and weights, moved away from the reference."""
    args = trl.DPOConfig(str(folder), **{**SHORT, "max_length": None, **more})
    theirs = trl.DPOTrainer(trainer.model.name_or_path, args=args, train_dataset=Dataset.from_list(rows))
    losses = []
    for each in (trainer, theirs):
        shake(each.model.eval(), scale=0.02)
        losses.append(each.compute_loss(each.model, collated(each)))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert abs(losses[0] - 0.6931) > 1e-4
    got, want = gradients(trainer, losses[0]), gradients(theirs, losses[1])
    assert_same_gradients(got, {name: g for name, g in want.items() if name in got or g.any()}, rtol=1e-5)


def train(model, rows, folder, **more):
    """Train for two steps: (trainer, names of the parameters that moved). The loss of each step was logged."""
    trainer = trainer_on(model, rows, folder, **more)
    return trainer, steps(trainer)


def steps(trainer):
    before = snapshot(trainer.model)
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and "train_loss" in trainer.state.log_history[-1]
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


def trains_all(model, rows, folder, **more):
    trainer, changed = train(model, rows, folder, **more)
    assert set(dict(trainer.model.named_parameters())) - changed == set()
    return trainer


def trains_adapter(model, rows, folder, **more):
    """The adapter moves, all of it; its base and the adapter of the reference do not."""
    trainer, changed = train(model, rows, folder, **more)
    lora = {name for name, _ in trainer.model.named_parameters() if "lora_" in name and ".ref." not in name}
    assert changed == lora and lora
    return trainer
