"""What the steps of a trainer gave: gradients, logs, the names of rows."""

import torch
from trainer_kit import trainable
from transformers import TrainerCallback


def gradients(trainer, loss):
    params = trainable(trainer.model)
    grads = torch.autograd.grad(loss, params.values(), allow_unused=True)
    return {name: g for name, g in zip(params, grads) if g is not None}


def assert_same_gradients(got, want, rtol=1e-5, of=""):
    """Relative to the largest gradient of each tensor's kind: single entries may cancel to nothing."""
    assert set(got) == set(want) and want
    norm = torch.cat([g.flatten() for g in want.values()]).norm()
    assert norm > 0
    difference = torch.cat([(got[k] - want[k]).flatten() for k in want]).norm()
    assert difference <= rtol * norm, f"gradients {of} differ by {difference / norm:.1e} of their norm"


def names_of(trainer):
    """Train, and return the names of the rows of each step."""
    names, loss = [], trainer.compute_loss
    trainer.compute_loss = lambda m, inputs, **kw: names.append(inputs["names"]) or loss(m, inputs, **kw)
    trainer.train()
    return names


def tokens_read(trainer):
    """Tokens of the training rows as the policy reads them: each response behind its own prompt."""
    trees = [trainer.data_collator.encode(example) for example in trainer.train_dataset]
    return sum(len(tree.trunks[0].ids) + len(branch.ids) for tree in trees for branch in tree.branches)


def history(trainer):
    """Everything that was logged, without what a clock decides."""
    clock = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(clock)} for entry in trainer.state.log_history]


def snapshot(model, part=""):
    """Copies of the tensors whose names hold `part`."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if part in name}


class Gradients(TrainerCallback):
    """The gradients that the optimizer gets in each step, by name."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append({k: p.grad.clone() for k, p in trainable(model).items() if p.grad is not None})


def losses_of(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
