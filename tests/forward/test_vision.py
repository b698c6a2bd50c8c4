"""Media pass a frozen tower once a step, and no backward pass; the twin computes everything in both passes."""

import logging

import pytest
import torch
from families import FAMILIES, build
from helpers import row
from peft import LoraConfig
from step_kit import assert_same_gradients
from torch.utils._pytree import tree_leaves
from trainer_kit import collated, draw_lora, trainable, trainer_of
from transformers import LlavaModel

from trl_vpo import PreferenceCollator
from trl_vpo.forward import layouts
from trl_vpo.forward.families import VISION_INPUTS, merge_media, placeholders
from trl_vpo.forward.parts import part_of
from trl_vpo.forward.vision import VisionFeatures
from trl_vpo.models.adapters import preset_targets

RECOMPUTED = {
    kind: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    for kind in ("reentrant", "not reentrant")
}


def make(name, kind, media, folder, method="rrpo", target=None, saved=None, **more):
    """A trainer that trains the projector too, and whose policy is not its reference."""
    model, processor = build(name)
    targets = target or preset_targets(model, "language" if saved else "language+projector")[0]
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=saved) if target != "full" else None
    own = {"critical_box": [4, 8, 30, 40]} if kind == "list" else {}
    kind = "image" if kind == "list" else kind
    second = row(kind, [media[kind][1]], "a square.", "two circles are here.", **own)
    data = [row(kind, [media[kind][0]], **own), second, *([] if own else [row(None)])]
    more = {"num_frames": 6, "peft": None, "peft_config": config, "layout": "shared", **more}
    trainer = trainer_of(method, folder, data, model=model, processor=processor, **more)
    draw_lora(trainer.model, std=0.05)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "modules_to_save" in name or target == "full":
                weight.add_(0.05)
    trainer.model.train()
    if trainer.args.gradient_checkpointing:  # as `train` does
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def watch(trainer):
    """A list for each layer of the tower: whether autograd was on, at each of its runs."""
    modules = {f"{name}.": module for name, module in trainer._bare(trainer.model).named_modules()}
    runs = []
    for name, module in modules.items():
        if part_of(name) == "vision" and name[-2:-1].isdigit() and list(module.parameters()):
            runs.append([])
            hook = lambda *_, seen=runs[-1]: seen.append(torch.is_grad_enabled())  # noqa: E731
            module.register_forward_hook(hook)
    assert runs
    return runs


def step(trainer, batch=None):
    """Log-probs, gradients, and the runs of the tower's layers."""
    runs = watch(trainer)
    loss, scores = trainer.compute_loss(trainer.model, batch or collated(trainer), return_outputs=True)
    loss.backward()
    grads = {name: p.grad for name, p in trainable(trainer.model).items() if p.grad is not None}
    return scores.logps.detach(), grads, runs


def assert_same_step(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(got[1], want[1])


def compute_all(monkeypatch):
    monkeypatch.setattr(VisionFeatures, "features", lambda self, name, compute: compute())


PROJECTORS = [(name, "image", "not reentrant", {}) for name in FAMILIES] + [
    ("LLaVA-OneVision", "video", "reentrant", {}),
    ("Qwen3-VL", "video", "reentrant", {}),
    ("Qwen3-VL", "image", "not reentrant", {"saved": ["merger"]}),
    ("Qwen3-VL", "image", "reentrant", {"saved": ["deepstack_merger_list.0"]}),
    ("LLaVA-1.5", "image", "reentrant", {"saved": ["multi_modal_projector"]}),
    ("Idefics2", "image", "reentrant", {"target": r".*perceiver_resampler\.layers\.0\..*_proj"}),
    ("Idefics2", "image", "not reentrant", {"target": r".*modality_projection\.gate_proj"}),
    ("Qwen2.5-VL", "image", "reentrant", {"target": r".*merger\.mlp\.2"}),
]


@pytest.mark.parametrize(("name", "kind", "recomputed", "more"), PROJECTORS)
def test_a_trained_projector_reuses_its_tower(name, kind, recomputed, more, media, tmp_path, monkeypatch):
    """With gradient checkpointing, which makes the tower's embeddings require gradients."""
    more = more | RECOMPUTED[recomputed]
    got = step(make(name, kind, media, tmp_path, **more))
    compute_all(monkeypatch)
    want = step(make(name, kind, media, tmp_path, **more))
    for runs, twice in zip(got[2], want[2], strict=True):
        assert runs and not any(runs) and len(twice) >= 2 * len(runs)
    assert_same_step(got, want)
    assert any(part_of(name) == "projector" for name in got[1])


def test_a_frozen_tower_without_a_reference(media, tmp_path, monkeypatch):
    got = step(make("Qwen3-VL", "image", media, tmp_path, "leanpo", **RECOMPUTED["reentrant"]))
    compute_all(monkeypatch)
    want = step(make("Qwen3-VL", "image", media, tmp_path, "leanpo", **RECOMPUTED["reentrant"]))
    assert all(runs == [False] for runs in got[2]) and any(any(runs) for runs in want[2])
    assert_same_step(got, want)


@pytest.mark.parametrize("name", ["Qwen3-VL", "LLaVA-OneVision"])
def test_evaluation_reuses_the_tower(name, media, tmp_path, monkeypatch):
    trainer = make(name, "image", media, tmp_path)
    runs, batch = watch(trainer), collated(trainer)
    got = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0]
    assert all(seen == [False] for seen in runs)
    compute_all(monkeypatch)
    assert torch.equal(got, trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0])


def test_features_that_pass_the_projector_by(media, tmp_path, monkeypatch, caplog):
    """The tower's output is also added behind the projector: nothing is reused, and a warning says so."""
    plain = LlavaModel.get_image_features

    def features(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.pooler_output = [x + out.last_hidden_state.mean() for x in out.pooler_output]
        return out

    monkeypatch.setattr(LlavaModel, "get_image_features", features)
    with caplog.at_level(logging.WARNING):
        got = step(make("LLaVA-1.5", "image", media, tmp_path))
    assert "goes past the modules that train" in caplog.text and all(len(runs) == 2 for runs in got[2])
    compute_all(monkeypatch)
    assert_same_step(got, step(make("LLaVA-1.5", "image", media, tmp_path)))


SEPARATE = [("Qwen3-VL", "video", False), ("LLaVA-OneVision", "video", False), ("Idefics2", "image", False)]
SEPARATE += [("LLaVA-NeXT-Video", "video", True), ("SmolVLM", "video", True), ("InternVL", "image", True)]
SEPARATE += [("Qwen2.5-VL", "image", True), ("LLaVA-OneVision", "video", True), ("Qwen3-VL", "list", True)]


@pytest.mark.parametrize(("name", "kind", "packs"), SEPARATE)
def test_branches_share_the_features_of_their_trunk(name, kind, packs, media, tmp_path, monkeypatch):
    """Each response has a prompt of its own, but not its media; everything trains. The twin repeats the media. In full
    fine-tuning, the reference is a model of its own."""
    more = {"target": preset_targets(build(name)[0], "all")[0] if packs else "full", "layout": "separate"}
    steps, pixels = [], []
    for twin in (False, True):
        if twin:
            monkeypatch.setattr(layouts, "placeholders", lambda *_: None)
        trainer = make(name, kind, media, tmp_path, "lpoi" if kind == "list" else "dpo", **more)
        trainer.scorer.packs = packs
        batch = collated(trainer)
        steps.append(step(trainer, batch))
        call = batch["layout"][1]
        assert (call.segments is not None) == packs and (call.copies is None) == twin
        values = [call.inputs[name] for name in VISION_INPUTS if name in call.inputs]
        pixels.append(sum(int((x != 0).sum()) for x in tree_leaves(values)))
    assert pixels[1] >= 1.2 * pixels[0] > 0
    assert_same_step(*steps)
    assert any(part_of(name) == "vision" and grad.any() for name, grad in steps[0][1].items())


def test_a_tensor_alone_is_not_copied():
    one, other = {"pixel_values": torch.rand(3, 2)}, {"pixel_values": torch.rand(1, 2)}
    assert merge_media([one])["pixel_values"] is one["pixel_values"]
    assert len(merge_media([one, {}, other])["pixel_values"]) == 4


def test_features_under_another_token_are_not_counted(media):
    """GLM-4V has frames of videos under the token of images: then media are repeated."""
    model, processor = build("Qwen2-VL")
    batch = PreferenceCollator(processor)([row("video", media["video"][:1]), row(None)])
    assert placeholders(batch, model.base_model)["get_video_features"][0] > 0
    model.config.video_token_id = model.config.image_token_id
    assert placeholders(batch, model.base_model) is None
