"""`VisualDPOTrainer` against `trl.DPOTrainer` on the same rows: same loss, gradients, metrics and weights."""

import pytest
import torch
from parity_kit import batch, pair
from step_kit import assert_same_gradients, gradients
from trainer_kit import trainable

NOT_COMPARED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
OURS = {"loss/sigmoid", "displacement/chosen", "displacement/rejected", "displacement/both_fall"}
OURS |= {"logps/chosen_average", "logps/rejected_average"}
NOT_COMPARED |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}

KINDS = ["Qwen2-VL", "LLaVA-1.5", "one image", "messages", "messages, BOS", "strings", "strings, BOS", "implicit"]


@pytest.mark.parametrize("layout", ["separate", "shared"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_loss_and_gradients(kind, full, layout, images, tmp_path):
    ours, theirs = pair(kind, images, tmp_path, full, layout, per_device_eval_batch_size=4)
    got, want = (t.compute_loss(t.model, batch(t)) for t in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert abs(want - 0.6931) > 1e-4  # the policy is not the reference
    got, want = gradients(ours, got), gradients(theirs, want)
    if full:  # tensors without influence: TRL's graph gives zeros where ours gives nothing
        want = {k: g for k, g in want.items() if k in got or g.abs().max() > 0}
    assert_same_gradients(got, want)


@pytest.mark.parametrize("kind", ["Qwen2-VL", "LLaVA-1.5", "messages", "strings, BOS"])
def test_same_training(kind, images, tmp_path):
    """Three steps: every number that TRL logs, in training and evaluation, and the weights at the end."""
    more = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.5, "warmup_steps": 1}
    more |= {"optim": "sgd", "learning_rate": 1.0}  # Adam makes whole steps of gradients that are rounding alone
    ours, theirs = pair(kind, images, tmp_path, **more)
    for trainer in (ours, theirs):
        trainer.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for got, want in zip(ours.state.log_history, theirs.state.log_history):
        assert set(want) <= set(got) <= set(want) | OURS | {f"eval_{key}" for key in OURS}
        for key in set(want) - NOT_COMPARED:
            assert got[key] == pytest.approx(want[key], rel=2e-4, abs=2e-5), key
    got, want = (torch.cat([p.flatten() for p in trainable(t.model).values()]) for t in (ours, theirs))
    assert (got - want).norm() <= 1e-6 * want.norm()
