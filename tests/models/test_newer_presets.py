"""The presets of `lora_target_modules` in the newer families: exactly these layers, and calls reach each of them."""

import re

import pytest
import torch
from accelerate import PartialState
from families_newer import NEWER
from helpers import row
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_vpo import PreferenceCollator
from trl_vpo.errors import RecipeError
from trl_vpo.forward.scorer import Scorer
from trl_vpo.media.load import VideoOptions
from trl_vpo.models.adapters import target_modules

LINEAR = r"model\.multi_modal_projector\.linear_\d"
MISTRAL = rf"{LINEAR}|model\.multi_modal_projector\.patch_merger\.merging_layer"
GLM = r"model\.visual\.merger\.(proj|gate_proj|up_proj|down_proj)"
PROJECTORS = {  # whole names of linear layers; the others have `LINEAR`
    "Gemma 3n": r"model\.embed_vision\.embedding_projection",
    **dict.fromkeys(["Gemma 4", "Gemma 4 MoE"], r"model\.embed_vision\.embedding_projection"),
    "Gemma 4 unified": r"model\.embed_vision\.(patch_dense|multimodal_embedder\.embedding_projection)",
    **dict.fromkeys(["PaliGemma", "PaliGemma 2"], r"model\.multi_modal_projector\.linear"),
    **dict.fromkeys(["Mllama", "Step-3.7"], r"model\.multi_modal_projector"),
    **dict.fromkeys(
        ["Llama 4", "Llama 4, short chunks"],
        r"multi_modal_projector\.linear_1|vision_model\.vision_adapter\.mlp\.fc\d",
    ),
    **dict.fromkeys(["Mistral 3", "Mistral 4", "Mistral Large 4"], MISTRAL),
    "Qwen3-VL MoE": r"model\.visual\.(merger|deepstack_merger_list\.\d)\.linear_fc\d",
    **dict.fromkeys(["Qwen3.5", "Qwen3.5 MoE", "Qwen4-exp"], r"model\.visual\.merger\.linear_fc\d"),
    "Qwen2.5-Omni thinker": r"model\.visual\.merger\.mlp\.\d",
    "Qwen3-Omni MoE thinker": r"model\.visual\.(merger|merger_list\.\d)\.mlp\.\d",
    "Ovis2": r"model\.vision_tower\.head_linear",
    **dict.fromkeys(["MiniCPM-V 4.6", "MiniCPM-V 4.7"], r"model\.merger\.mlp\.\d\.linear_\d"),
    "Molmo2": r"model\.multi_modal_projector\.(image_pooling_2d\.[qkvo]_proj|image_projector\.(gate|up|down)_proj)",
    "Phi-4-multimodal": r"model\.embed_tokens_extend\.image_embed\.img_projection_(up|down)",
    **dict.fromkeys(["GLM-4.1V", "GLM-4.6V"], GLM),
    "GLM-4.5V": r"model\.visual\.merger\.proj",
    "ERNIE 4.5 VL": r"model\.resampler_model\.(mlp|(spatial|temporal)_linear\.fc\d)",
    "VideoLLaMA 3": r"model\.projector\.readout\.\d",
    "Kimi K2.5": r"model\.mm_projector\.(in|out)_proj",
    "DeepSeek-VL": r"model\.aligner\.linear\d",
    "DeepSeek-VL hybrid": r"model\.aligner\.(proj|vision_proj|high_res_vision_proj)",
    "Janus": r"model\.aligner\.(fc1|hidden_layers\.\d)",
    "Granite 4 Vision": r"model\.(layerwise|spatial)_projectors\.\d\..+",
    "Hunyuan-VL": r"model\.vision_tower\.patch_merger\.mlp",
    "MiniMax-M3-VL": r"model\.multi_modal_projector\.(merge_)?linear_\d",
    "Nemotron-H Omni": r"multi_modal_projector\.linear_\d",
}
LEFT_OUT = {  # linear layers of a decoder that are no attention and no MLP
    "Gemma 3n": r".*\.altup\..*",
    "Gemma 4 MoE": r".*\.router\.proj",
    **dict.fromkeys(["Llama 4", "Llama 4, short chunks"], r".*\.(router|lm_head)"),
    "Nemotron-H Omni": r".*\.lm_head",
    "Qwen3.5 MoE": r".*\.shared_expert_gate",
    "Qwen4-exp": r".*\.(shared_expert_gate|indexer\..*)",
    **dict.fromkeys(["Mistral Large 4", "MiniMax-M3-VL"], r".*\.indexer\..*"),
    "Phi-4-multimodal": r".*\.embed_tokens_extend\..*",
    "GLM-4.5V": r".*\.mlp\..*",  # PEFT takes them for experts
}
NO_LAYERS = ["Gemma 3", "Gemma 3, short windows"]  # the projector is a parameter


def names_of(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def cases(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * NEWER[name].slow) for name in names]


@pytest.mark.filterwarnings("ignore:.*(experts|are not adapted)")
@pytest.mark.parametrize("name", cases(NEWER))
def test_presets_adapt_layers_that_are_reached(name, media):
    """One step over an image and a video, with padded rows: no adapter is left without a gradient."""
    torch.manual_seed(0)
    model, processor = NEWER[name].build()
    PartialState(cpu=True)
    decoder = {*model.get_decoder().modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    want = {n for n, m in linear.items() if m in decoder and not re.fullmatch(LEFT_OUT.get(name, ""), n)}
    preset = "language"
    if name not in NO_LAYERS:
        preset = "language+projector"
        want |= {n for n in linear if re.fullmatch(PROJECTORS.get(name, LINEAR), n)}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target_modules(model, preset)))
    assert names_of(adapted) == want
    lora = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    for weight in (p for p in adapted.parameters() if not p.any()):  # gates of Mllama, and lora_B
        torch.nn.init.normal_(weight, std=0.1)
    kinds = ["image", *["video"] * (NEWER[name].video and name != "Mllama")]
    rows = [row(kind, media[kind][:1], "a red square.", "left.") for kind in kinds]
    if not NEWER[name].chat:
        rows = [
            r | {part: r[part][0]["content"][-1]["text"] for part in ("prompt", "chosen", "rejected")} for r in rows
        ]
    batch = PreferenceCollator(processor, video=VideoOptions(num_frames=6))(rows)
    scorer = Scorer(model, layout="separate", pad_token_id=processor.tokenizer.pad_token_id)
    scorer.packs = False
    adapted.train()
    scorer.score(model, batch).logps.sum().backward()
    assert all(p.grad is not None for p in lora)


@pytest.mark.parametrize("name", cases(NO_LAYERS))
def test_a_projector_without_linear_layers(name):
    model, _ = NEWER[name].build()
    with pytest.raises(
        RecipeError, match=r"no linear layer in its projector \(model\.multi_modal_projector\.mm_input"
    ):
        target_modules(model, "language+projector")
    everything = names_of(get_peft_model(model, LoraConfig(target_modules=target_modules(model, "all"))))
    assert any("vision_tower" in name for name in everything)


@pytest.mark.filterwarnings("ignore:.*(experts|are not adapted)")
@pytest.mark.parametrize("name", ["Qwen2.5-Omni thinker", "Qwen3-Omni MoE thinker", "Janus", "Phi-4-multimodal"])
def test_all_is_what_rows_reach(name):
    """Not the towers of audio, nor what makes pictures."""
    model, _ = NEWER[name].build()
    names = names_of(get_peft_model(model, LoraConfig(target_modules=target_modules(model, "all"))))
    assert any(re.search(r"visual\.|vision_model\.|img_processor\.", name) for name in names)
    assert not any(re.search("audio|generation|vqmodel", name) for name in names)
