"""Frozen modules are in evaluation mode in every pass: no dropout, and running statistics that stay as they are."""

import pytest
import torch
from families import LANGUAGE_MODEL
from torch import nn
from trainer_kit import collated, fresh, image_rows, lora, text_rows, trainable, trainer_of

EVERYWHERE = rf"{LANGUAGE_MODEL}|.*vision_tower.*\.(q|k|v)_proj|.*linear_2"


class Normed(nn.Module):
    """A layer behind batch normalization and dropout."""

    def __init__(self, layer, **norm):
        super().__init__()
        self.norm, self.dropout, self.layer = nn.BatchNorm1d(layer.in_features, **norm), nn.Dropout(0.5), layer

    def forward(self, states):  # (N, tokens, H)
        return self.layer(self.dropout(self.norm(states.transpose(1, 2)).transpose(1, 2)))


def normed_llava(**norm):
    model, processor = fresh("LLaVA-1.5")
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    layer = (tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder).layers[0].mlp
    layer.fc1, projector.linear_1 = Normed(layer.fc1, **norm), Normed(projector.linear_1, **norm)
    return model, processor


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name or "batches" in name}


KINDS = {
    "language model": {"peft_config": lora()},
    "everywhere": {"peft_config": lora(target_modules=EVERYWHERE)},
    "biases": {"peft_config": lora(target_modules=EVERYWHERE, bias="all")},
    "full": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_stay_where_nothing_saves_them(kind, images, tmp_path):
    """Also in a tower that trains: the adapter that is saved then gives the log-probs that were trained."""
    model, processor = normed_llava()
    if kind == "full":
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.requires_grad_(False)
    before = statistics(model)
    more = {"model": model, "processor": processor, "peft": None, "disable_dropout": False, **KINDS[kind]}
    trainer = trainer_of("leanpo", tmp_path, image_rows(images), name="LLaVA-1.5", **more)
    moved = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    trainer.train()
    assert any(not torch.equal(p, moved[name]) for name, p in trainable(trainer.model).items())
    after = statistics(trainer.model)
    assert len(after) == len(before) == 6
    assert all(torch.equal(a, b) for a, b in zip(after.values(), before.values()))


def test_a_frozen_tower_gives_the_same_in_both_modes(images, tmp_path):
    """Dropout that is not disabled belongs to what trains."""
    model, processor = normed_llava()
    trainer = trainer_of("dpo", tmp_path, image_rows(images), name="LLaVA-1.5", model=model, processor=processor,
                         disable_dropout=False)  # fmt: skip
    batch, logps = collated(trainer), []
    for training in (False, True, True):
        trainer.model.train(training)
        logps.append(trainer.concatenated_forward(trainer.model, batch).logps)
    assert torch.equal(logps[0], logps[1]) and torch.equal(logps[1], logps[2])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0.693147, abs=1e-6)


def test_a_reference_that_was_given_in_training_mode(images, tmp_path):
    """Full fine-tuning copies the model; batch normalization in the copy does not move."""
    model, processor = normed_llava()
    trainer = trainer_of("dpo", tmp_path, image_rows(images), name="LLaVA-1.5", model=model.train(), peft=None,
                         processor=processor)  # fmt: skip
    before = statistics(trainer.ref_model)
    trainer.train()
    assert all(torch.equal(b, before[name]) for name, b in statistics(trainer.ref_model).items())


def test_statistics_that_are_saved_move(images, tmp_path):
    """Full fine-tuning saves them with the weights."""
    model, processor = normed_llava()
    before = statistics(model)
    trainer_of("leanpo", tmp_path, image_rows(images), name="LLaVA-1.5", model=model, peft=None,
               processor=processor).train()  # fmt: skip
    assert all(not torch.equal(b, before[name]) for name, b in statistics(model).items())


def test_what_a_frozen_layer_needs_for_training_stays(tmp_path):
    """LoRA on the last layer, with dropout: the first layer is frozen, and still recomputes its activations; the
    embeddings still get NEFTune's noise."""
    config = lora(text=True, target_modules=r".*layers\.1\.self_attn\.q_proj", lora_dropout=0.5)
    more = {"peft": None, "peft_config": config, "gradient_checkpointing": True, "max_steps": 1}
    more |= {"disable_dropout": False, "neftune_noise_alpha": 5.0}
    trainer = trainer_of("leanpo", tmp_path, text_rows(2), layout="shared", **more)
    layer, calls, modes = trainer.model.get_base_model().model.layers[0], [], []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    dropouts = [m for m in trainer.model.modules() if isinstance(m, nn.Dropout) and m.p == 0.5]
    for module in (*dropouts, trainer.model.get_input_embeddings()):
        module.register_forward_pre_hook(lambda module, _: modes.append((type(module).__name__, module.training)))
    trainer.train()
    assert len(calls) == 2 and set(modes) == {("Dropout", True), ("Embedding", True)}
    assert not layer.mlp.training and layer.training
