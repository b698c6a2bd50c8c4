"""The weight of a row is the number of times that it counts, in every method."""

import types

import pytest
import torch
from step_kit import assert_same_gradients, gradients
from trainer_kit import METHODS, TEXT_METHODS, image_rows, shake, text_rows, trainer_of


def rows_for(method, images, order, weights):
    listed = method not in TEXT_METHODS
    rows = image_rows(images, 4) if listed else text_rows(4)
    for i, r in enumerate(rows if listed else ()):
        r |= {"image_list": images[: 2 + i % 2 * (method == "lpoi")], "images": None}
    return [rows[i] | {"weight": weight} for i, weight in zip(order, weights)]


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_counts_a_row_so_often(method, images, tmp_path):
    """Row 1 with weight 2 is that row twice, row 2 with weight 0 is none, two halves of row 3 are one. The divisor and
    the tokens per pair are in both cases those of all five rows: a weight changes neither."""
    name = "text" if method in TEXT_METHODS else "Qwen2-VL"
    results = []
    for order, weights in (((0, 1, 2, 3, 3), (1, 2, 0, 0.5, 0.5)), ((0, 1, 1, 3), (1, 1.0, None, 1))):
        trainer = trainer_of(method, tmp_path, rows_for(method, images, order, weights), name=name)
        shake(trainer.model)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
        if not results:
            tokens = batch["branch_mask"][batch["chosen"]].sum()
            assert batch["weights"].tolist() == [1, 2, 0, 0.5, 0.5]
        batch["totals"] = torch.stack([torch.tensor(5), tokens])
        loss = trainer.compute_loss(trainer.model, batch)
        results.append((loss.item(), gradients(trainer, loss)))
    (got, got_gradients), (want, want_gradients) = results
    assert got == pytest.approx(want, rel=1e-5)
    assert_same_gradients(got_gradients, want_gradients)


def test_the_logged_loss_is_weighted_and_its_terms_are_not(tmp_path):
    """LeanPO's NLL is part of the pair's loss; its mean over tokens stays one of all of them."""
    rows = [r | {"weight": w} for r, w in zip(text_rows(4), (2.0, 0.0, 0.25, None))]
    sizes = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0}
    logs = []
    for data in (rows, text_rows(4)):
        trainer = trainer_of("leanpo", tmp_path, data, nll_weight=0.5, **sizes)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    weighted, plain = logs
    assert {k for k in plain if weighted[k] != pytest.approx(plain[k], rel=1e-5)} == {"loss", "grad_norm"}
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    losses = trainer.preference_loss(trainer.concatenated_forward(trainer.model, batch), None, batch).losses
    want = (2.0 * losses[0] + 0.25 * losses[2] + losses[3]) / 4
    assert weighted["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_deepspeed_leaves_the_numbers_of_rows_alone(tmp_path, monkeypatch):
    """`Trainer` moves a batch in the dtype of DeepSpeed's config: 200 nats would be off by half a nat."""
    trainer = trainer_of("dpo", tmp_path, [r | {"weight": 0.3} for r in text_rows(2)])
    trainer.is_deepspeed_enabled = True
    config = types.SimpleNamespace(dtype=lambda: torch.bfloat16)
    plugin = types.SimpleNamespace(hf_ds_config=config)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    moved = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)) | {"pixels": torch.ones(2, 3)})
    assert moved["pixels"].dtype == torch.bfloat16
    assert moved["weights"].tolist() == torch.tensor([0.3, 0.3]).tolist()
