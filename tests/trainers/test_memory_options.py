"""Checkpointing and offloading: the same step in less memory, or a refusal before anything is loaded."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from benchmarks.knobs import KNOBS, cpu_as_accelerator, measure
from families_newer import build
from step_kit import Gradients, assert_same_gradients
from torch.utils.checkpoint import CheckpointPolicy
from trainer_kit import METHODS, by_speed, image_rows, shake, text_rows, trainer_of

from trl_vpo.errors import RecipeError
from trl_vpo.trainers.compat import _saves_attention
from trl_vpo.trainers.setup import check_memory

REENTRANT = {"use_reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}}
REENTRANT |= {"use_reentrant, offload": {"gradient_checkpointing_kwargs": {"use_reentrant": True, "offload": True}}}
VISUAL = {"critical_box": [4, 4, 40, 30]}


@pytest.mark.parametrize("method", by_speed([*METHODS, "rrpo, full"], quick=("dpo", "lpoi")))
def test_less_memory_and_the_same_step(method, images, tmp_path):
    """The metrics and gradients of a step, the reference pass included, and what it keeps for its backward pass."""
    method, full, _ = method.partition(", full")
    steps, kept, peft = {}, {}, None if full else "new"
    for knob, options in (KNOBS | REENTRANT).items():
        with cpu_as_accelerator() if "activation_offloading" in options else nullcontext():
            more = {"name": "Qwen2-VL", "peft": peft, "max_steps": 1, "gradient_checkpointing": True, **options}
            trainer = trainer_of(method, tmp_path, image_rows(images, 4, **VISUAL), **more)
        shake(trainer.model)
        trainer.add_callback(seen := Gradients())
        kept[knob] = measure(trainer, trainer.train, "cpu")
        (grads,) = seen.steps
        logged = {k: v for k, v in trainer.state.log_history[0].items() if not k.endswith(("runtime", "per_second"))}
        steps[knob] = logged, grads
    want, exact = steps["nothing"]
    for logged, grads in steps.values():
        assert logged == pytest.approx(want, rel=1e-5)
        assert_same_gradients(grads, exact)
    device = {knob: numbers["kept_mib"] for knob, numbers in kept.items()}
    less = ["offload: true", "gradient_checkpointing", "selective: true", "every_n_layers: 2", "nothing"]
    assert sorted(less, key=device.get) == less and len(set(map(device.get, less))) == len(less)
    assert device["offload: true"] < device["selective and offload"] < device["selective: true"]
    assert device["activation_offloading alone"] < 0.5 * device["nothing"]
    assert device["activation_offloading and checkpointing"] < device["gradient_checkpointing"]
    assert device["use_reentrant, offload"] < device["use_reentrant"] < device["nothing"]
    assert {knob for knob, numbers in kept.items() if numbers["host_mib"]} == {k for k in kept if "offload" in k}


def test_layers_that_share_keys_are_not_recomputed_so(tmp_path):
    """Gemma 4's gradients were up to 40 % off."""
    model, processor = build("Gemma 4")
    more = {"gradient_checkpointing": True, "model": model, "processor": processor, "peft": None}
    trainer_of("dpo", tmp_path, text_rows(2), gradient_checkpointing_kwargs={"use_reentrant": False}, **more)
    with pytest.raises(RecipeError, match="2 layers of this model share keys and values"):
        trainer_of("dpo", tmp_path, text_rows(2), gradient_checkpointing_kwargs={"use_reentrant": True}, **more)


def test_attention_is_known_by_the_name_of_its_kernel():
    import torch.nn.attention.varlen

    aten = torch.ops.aten
    kept = [torch.ops.torch_attn._varlen_attn.default, "_flash_attn2_cuda_f12afc9.varlen_fwd.default"]
    kept += [
        getattr(aten, f"_scaled_dot_product_{kind}_attention").default for kind in ("flash", "efficient", "cudnn")
    ]
    assert {_saves_attention(None, op) for op in kept} == {CheckpointPolicy.MUST_SAVE}
    again = (aten.mm.default, aten.silu.default, aten._softmax.default)
    assert {_saves_attention(None, op) for op in again} == {CheckpointPolicy.PREFER_RECOMPUTE}


ZERO3 = SimpleNamespace(zero_stage=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_offloading": True}, "torch sees no GPU"),
        ({"gradient_checkpointing": False}, "needs gradient_checkpointing: true"),
        ({"gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": True}}, "Leave `use_reentrant: true`"),
        ({"gradient_checkpointing_kwargs": {"selective": "maybe"}}, "_kwargs: selective is 'maybe': give true or"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 0}}, "every_n_layers is 0: give a whole number of at l"),
        ({"gradient_checkpointing_kwargs": {"every_n_layer": 2}}, "`every_n_layer`. Did you mean every_n_layers"),
        ({"gradient_checkpointing_kwargs": {"x": 2}}, "_kwargs: unknown key `x`. It takes every_n_layers, offload"),
        ({"gradient_checkpointing_kwargs": "every_n_layers: 2"}, "give a mapping, such as {every_n_layers: 2}"),
        ({"deepspeed_plugin": ZERO3}, "ZeRO-3"),
    ],
)
def test_ways_that_would_fail_in_the_first_step(options, message, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = {"activation_offloading": False, "gradient_checkpointing": True, "deepspeed_plugin": None}
    args |= {"gradient_checkpointing_kwargs": {"selective": True}}
    check_memory(SimpleNamespace(**args), adapted=True)
    check_memory(SimpleNamespace(**args | {"deepspeed_plugin": ZERO3}), adapted=False)
    with pytest.raises(ValueError, match=message):
        check_memory(SimpleNamespace(**args | options), adapted=True)
