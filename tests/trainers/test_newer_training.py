"""Every newer family takes a step of every method, and its adapter loads in plain PEFT."""

import math

import pytest
import torch
from families_newer import NEWER, build, example
from helpers import message
from peft import LoraConfig, PeftModel
from step_kit import losses_of, snapshot
from trainer_kit import METHODS, trainer_of

QUICK = ("dpo", "rrpo")


def cases():
    for name, family in ((name, family) for name, family in NEWER.items() if family.adapter):
        for method in METHODS:
            kind = "video" if family.video and method in ("rrpo", "leanpo") else "image"
            marks = [pytest.mark.slow] * (family.slow or method not in QUICK)
            yield pytest.param(name, method, kind, marks=marks, id=f"{name}-{method}")


@pytest.mark.parametrize(("name", "method", "kind"), cases())
def test_a_step_and_its_adapter(name, method, kind, media, tmp_path):
    """It moves the adapter and nothing else; of layers that a family calls, not keys and values that Gemma's share."""
    model, processor = build(name)
    made = example(NEWER[name], kind, media)
    if method == "lpoi":
        made["critical_box"] = [4, 8, 30, 40]
    if method == "symmpo":
        other = "nothing moves." if isinstance(made["chosen"], str) else message("assistant", "nothing moves.")
        others = [image for image in media["image"] if image not in made["images"]]
        made |= {"other_images": others[: len(made["images"])], "other_chosen": other}
    more = {"peft": None, "peft_config": LoraConfig(r=4, target_modules="language"), "num_frames": 6}
    more |= {"max_steps": 1, "layout": "auto"}
    trainer = trainer_of(method, tmp_path / "out", [made] * 2, model=model, processor=processor, **more)
    before = snapshot(trainer.model)
    trainer.train()
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert math.isfinite(losses_of(trainer)[0]) and moved and all("lora_B" in key for key in moved)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(build(name)[0], tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], trainer.model.state_dict()[key]) for key in moved)
