"""The shared layout inside what users put around a model: quantization, torch.compile. (Distributed engines:
tests/trainers/test_distributed.py.)"""

import pytest
import torch
import trainer_kit
from datasets import Dataset
from families import build
from helpers import row
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig


@pytest.fixture(scope="module")
def data(images):
    return Dataset.from_list(
        [row("image", [images[0]]), row("image", [images[1]], "a square.", "two circles are in the picture.")]
    )


def trainer_of(model, processor, data, folder, layout):
    more = {"layout": layout, "gradient_checkpointing": True}
    trainer = trainer_kit.trainer_of("rrpo", folder, data, "Qwen2-VL", model, processor, **more)
    trainer_kit.draw_lora(trainer.model, std=0.05)
    trainer.model.train()
    return trainer


def step(trainer):
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(bits, data, tmp_path):
    model, processor = build("Qwen2-VL")
    model.save_pretrained(tmp_path / "base")
    skip = ["model.visual", "lm_head"]
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skip)
    steps = []
    for layout in ("separate", "shared"):
        quantized = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=quantization)
        kinds = {type(m).__name__ for m in quantized.model.language_model.modules()}
        assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
        prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
        steps.append(step(trainer_of(quantized, processor, data, tmp_path / "out", layout)))
    # Eight-bit layers round their inputs, outliers apart, by the largest of the whole call: not exactly alike.
    tolerance = 1e-3 if bits == 4 else 5e-2
    torch.testing.assert_close(steps[0][0], steps[1][0], rtol=tolerance, atol=tolerance)
    assert (steps[0][1] - steps[1][1]).norm() <= 2e-2 * steps[0][1].norm() * (1 if bits == 4 else 10)


def test_compiled_decoder_layers(data, tmp_path):
    want = step(trainer_of(*build("Qwen2-VL"), data, tmp_path, "separate"))
    trainer = trainer_of(*build("Qwen2-VL"), data, tmp_path, "shared")
    for layer in trainer.model.get_base_model().model.language_model.layers:
        layer.compile(backend="aot_eager")
    got = step(trainer)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert (got[1] - want[1]).norm() <= 1e-4 * want[1].norm()
