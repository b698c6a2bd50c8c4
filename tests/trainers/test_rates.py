"""`vision_learning_rate` and `projector_learning_rate`; several processes: test_distributed.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from step_kit import Gradients, losses_of, snapshot
from trainer_kit import config, image_rows, shake, text_rows, trainable, trainer_of

from trl_vpo.errors import RecipeError
from trl_vpo.forward.parts import part_of
from trl_vpo.trainers.rates import check_rates, set_rates

RATES = {"learning_rate": 1e-2, "vision_learning_rate": 1e-3, "projector_learning_rate": 4e-3}
ALL = LoraConfig(r=4, target_modules="all")
LINEAR = {"lr_scheduler_type": "linear", "max_steps": 2, "optim": "sgd", "max_grad_norm": 1e9}


@pytest.mark.parametrize(("name", "peft"), [("Qwen3-VL", ALL), ("Idefics2", ALL), ("LLaVA-OneVision", None)])
def test_each_part_steps_at_its_rate(name, peft, images, tmp_path):
    """Plain SGD, with weight decay where `Trainer` has it, over a schedule that falls to a half in the second step."""
    more = {"peft": None, "peft_config": peft, "weight_decay": 0.1, **LINEAR, **RATES}
    trainer = trainer_of("leanpo", tmp_path, image_rows(images, 4), name=name, **more)
    shake(trainer.model)
    seen = Gradients()
    trainer.add_callback(seen)
    decays = set(trainer.get_decay_parameter_names(trainer.model))
    weights = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    trainer.train()
    keys = {"vision": "vision_learning_rate", "projector": "projector_learning_rate", "language": "learning_rate"}
    assert {part_of(name) for name in weights} == set(keys)
    for step, grads in enumerate(seen.steps):
        for name, grad in grads.items():
            rate = RATES[keys[part_of(name)]] * (1, 0.5)[step]
            weights[name] -= rate * (grad + 0.1 * weights[name] * (name in decays))
    for name, p in trainable(trainer.model).items():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-5, atol=1e-7)
    assert losses_of(trainer, "learning_rate") == [1e-2, 5e-3]
    assert losses_of(trainer, "learning_rate/vision") == [1e-3, 5e-4]
    assert losses_of(trainer, "learning_rate/projector") == [4e-3, 2e-3]


def test_resumed_training_keeps_the_rates(images, tmp_path):
    """One part has a rate of its own, under AdamW; the second half of the run is the same, bit by bit."""
    more = {"peft": None, "peft_config": ALL, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    more |= {"lr_scheduler_type": "linear", "vision_learning_rate": 1e-3}
    ends = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        trainer = trainer_of("dpo", tmp_path, image_rows(images, 4), name="Qwen2-VL", **more)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append((snapshot(trainer.model, "lora_"), losses_of(trainer, "learning_rate/vision")))
    (want, rates), (got, again) = ends
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert rates == again == [1e-3, 7.5e-4, 5e-4, 2.5e-4]


@pytest.mark.parametrize(
    ("key", "name", "targets", "message"),
    [
        ("vision_learning_rate", "Qwen2-VL", "language+projector", "nothing of the vision tower trains"),
        ("projector_learning_rate", "Qwen2-VL", "language", "lora_target_modules: language\\+projector"),
        ("vision_learning_rate", "text", None, "nothing of the vision tower trains"),
    ],
)
def test_a_part_that_does_not_train(key, name, targets, message, images, tmp_path):
    rows = text_rows() if name == "text" else image_rows(images, 4)
    peft = {"peft": None, "peft_config": LoraConfig(target_modules=targets)} if targets else {}
    with pytest.raises(RecipeError, match=f"{key}=0.001: .*{message}"):
        trainer_of("leanpo", tmp_path, rows, name=name, **peft, **{key: 1e-3})


def test_a_part_that_is_frozen_later(images, tmp_path):
    trainer = trainer_of("leanpo", tmp_path, image_rows(images, 4), name="Qwen2-VL", peft=None, **RATES)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(part_of(name) != "projector")
    with pytest.raises(RecipeError, match="nothing of the projector trains"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"optimizer": object()}, "the optimizer is given"),
        ({"deepspeed": {"optimizer": {}}}, "DeepSpeed config has one group"),
        ({"deepspeed": {"scheduler": {}}}, "DeepSpeed config has one rate"),
        ({"fsdp": SimpleNamespace(fsdp_version=1, use_orig_params=False)}, "Use FSDP 2"),
    ],
)
def test_groups_that_are_made_elsewhere(where, message):
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=where.get("deepspeed", {})))
    trainer = SimpleNamespace(
        args=SimpleNamespace(vision_learning_rate=1e-3, projector_learning_rate=None, deepspeed_plugin=plugin),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=where.get("fsdp"))),
        model=torch.nn.ModuleDict({"visual": torch.nn.Linear(2, 2)}),
        optimizer=where.get("optimizer"),
    )
    with pytest.raises(RecipeError, match=message):
        check_rates(trainer)


def test_an_optimizer_without_groups():
    """Layer-wise optimizers step inside of the backward pass, and show a parameter that is none of the model's."""
    optimizer = SimpleNamespace(param_groups=[{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    args = SimpleNamespace(optim="galore_adamw_layerwise", vision_learning_rate=1e-3, projector_learning_rate=None)
    with pytest.raises(RecipeError, match="galore_adamw_layerwise has no groups of parameters"):
        set_rates(optimizer, torch.nn.ModuleDict({"visual": torch.nn.Linear(2, 2)}), args)


@pytest.mark.parametrize("rate", [-1e-3, math.nan, math.inf])
def test_rates_that_are_none(rate, tmp_path):
    with pytest.raises(ValueError, match=r"vision_learning_rate is .*: give (a finite number|at least 0)"):
        config("dpo", tmp_path, vision_learning_rate=rate)
