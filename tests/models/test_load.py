"""Weights that are loaded to answer: adapters, quantization, and settings that cannot be."""

import os

import pytest
import torch
from distributed_run import wide_model
from families import LANGUAGE_MODEL, write_model
from held_out_kit import write_adapter
from local_kit import GREEDY, load, questions
from peft import PeftModel

from trl_vpo.errors import AdapterError, ModelError
from trl_vpo.models.load import load_model
from trl_vpo.models.local import LocalModel
from trl_vpo.models.source import short_name
from trl_vpo.testbed.tiny_vlm import BASE


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random LoRA adapter on the language model, large enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter") / "last"
    return write_adapter(folder, scale=0.1, lora_alpha=16, target_modules=LANGUAGE_MODEL)


def save(model: LocalModel, folder) -> str:
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return str(folder)


def test_an_adapter_answers_as_its_merged_model(adapter):
    requests, base, tuned = questions(4), load(), load(adapter=adapter)
    assert tuned.record() == {"model": str(BASE), "adapter": adapter, "revision": None}
    merged = LocalModel(PeftModel.from_pretrained(load().model, adapter).merge_and_unload(), base.processor)
    averages = [m.average_logps(requests, ["a red square moves left."] * 4) for m in (tuned, merged, base)]
    assert averages[0] == pytest.approx(averages[1], abs=1e-4)
    assert min(abs(a - b) for a, b in zip(averages[0], averages[2])) > 0.01
    answers = tuned.answer(requests, GREEDY)
    assert answers == merged.answer(requests, GREEDY) != base.answer(requests, GREEDY)


def test_adapters_that_do_not_fit(tmp_path, adapter):
    with pytest.raises(ModelError, match=rf"{tmp_path} is not an adapter: its adapter_config\.json"):
        load(adapter=str(tmp_path))
    for step in (12, 3):  # what `train()` alone leaves, copied
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_config.json").touch()
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 - step,) * 2)
    with pytest.raises(ModelError, match=rf"Name {tmp_path}/checkpoint-12; `trainer\.save_model\(\)`"):
        load(adapter=str(tmp_path))
    base = load()
    copy = save(base, tmp_path / "another")
    with pytest.raises(ModelError, match=rf"was trained on .*base, but model_name_or_path is {copy}"):
        load(copy, adapter=adapter)
    # the right name, but another model: one layer is left
    base.model.config.text_config.num_hidden_layers = 1
    base.model.config.text_config.layer_types = ["full_attention"]
    del base.model.model.language_model.layers[1:]
    with pytest.raises(AdapterError, match=r"does not fit .*base: \d+ weights have no place in the model"):
        load(save(base, tmp_path / "base"), adapter=adapter)


def test_settings_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ModelError, match="there is no model"):
        load_model(None)
    with pytest.raises(ModelError, match=rf"{tmp_path} cannot be loaded"):
        load(tmp_path)
    with pytest.raises(ModelError, match="dtype is 'fp8'"):
        load(dtype="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device is 'cuda', but what this process has is cpu"):
            load(device="cuda")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide"), *wide_model())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_those_of_the_language_model(bits, wide):
    pytest.importorskip("bitsandbytes")
    model, requests = load(wide, **{f"load_in_{bits}bit": True}), questions(2)
    kinds = {name: type(module).__name__ for name, module in model.model.named_modules()}
    assert kinds["model.language_model.layers.0.self_attn.q_proj"] == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert kinds["model.visual.blocks.0.attn.qkv"] == kinds["lm_head"] == "Linear"
    assert len(model.answer(requests, GREEDY)) == 2
    quantized, exact = (m.average_logps(requests, ["left.", "a red square"]) for m in (model, load(wide)))
    assert quantized == pytest.approx(exact, abs=0.1) and quantized != exact


@pytest.mark.parametrize(
    "name, short",
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-2b-instruct"),
        ("/data/models/Qwen2-VL-2B-Instruct/", "qwen2-vl-2b-instruct"),
        ("/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/895c3a49bc3f", "qwen2-vl-2b-instruct"),
        ("/hub/models--gpt2/snapshots/607a30d7", "gpt2"),
    ],
)
def test_one_model_under_several_names(name, short):
    assert short_name(name) == short
