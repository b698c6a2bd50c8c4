"""Pixels are collated in the dtype to which the tower casts them: half of the bytes, the same features."""

import pytest
import torch
from families import KINDS, build
from helpers import row
from trainer_kit import collated, image_rows, trainer_of

from trl_vpo import PreferenceCollator
from trl_vpo.doctor.activation_estimate import tower_features
from trl_vpo.forward.families import VISION_INPUTS, merge_media
from trl_vpo.forward.vision import vision_features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_features_are_bit_for_bit_the_same(name, kind, dtype, media):
    model, processor = build(name)
    backbone, features = model.to(dtype).base_model, []
    for pixel_dtype in (None, vision_features(backbone).pixel_dtype):
        batch = PreferenceCollator(processor, pixel_dtype=pixel_dtype)([row(kind, media[kind][:1])])
        inputs = merge_media(batch["media"])
        assert {x.dtype for k, x in inputs.items() if k in VISION_INPUTS} == {pixel_dtype or torch.float32}
        assert pixel_dtype in (None, dtype) and inputs.get("second_per_grid_ts", torch.ones(1)).dtype == torch.float32
        with torch.no_grad():
            features.append(tower_features(backbone, inputs))
    assert features[0] and all(torch.equal(a, b) for a, b in zip(*features, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trainer_collates_in_the_dtype_of_its_tower(dtype, images, tmp_path):
    """An adapter is float32 in a tower of 16 bits."""
    model, processor = build("Qwen2-VL")
    trainer = trainer_of("leanpo", tmp_path, image_rows(images), model=model.to(dtype), processor=processor)
    assert {media["pixel_values"].dtype for media in collated(trainer)["media"]} == {dtype}
    assert trainer._padding_rows("pixel_values")["media"][0]["pixel_values"].dtype == dtype
    assert trainer.args.bf16 is False


def test_a_tower_that_computes_in_float32_first():
    backbone = build("LLaVA-1.5")[0].bfloat16().base_model
    assert vision_features(backbone).pixel_dtype == torch.bfloat16
    backbone.config.vision_config.model_type = "gemma4_vision"
    assert vision_features(backbone).pixel_dtype is None
