"""The presets of `lora_target_modules` in the newer families: exactly these layers, and calls reach each of them."""

import re

import pytest
import torch
from accelerate import PartialState
from families_newer import NEWER, build
from helpers import row
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion
from slow_kit import slow_logits
from torch import nn
from transformers.core_model_loading import WeightRenaming

from trl_vpo import PreferenceCollator
from trl_vpo.errors import RecipeError
from trl_vpo.forward.scorer import Scorer
from trl_vpo.media.load import VideoOptions
from trl_vpo.models.adapters import check_adapted, resolve_targets

LINEAR = r"model\.multi_modal_projector\.linear_\d"
MISTRAL = rf"{LINEAR}|model\.multi_modal_projector\.patch_merger\.merging_layer"
DEEPSTACK = r"model\.visual\.(merger|deepstack_merger_list\.\d)\.linear_fc\d"
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
    "Qwen3-VL MoE": DEEPSTACK,
    **dict.fromkeys(["Qwen3.5", "Qwen3.5 MoE", "Qwen4-exp"], r"model\.visual\.merger\.linear_fc\d"),
    **dict.fromkeys(["Cosmos3-Omni", "Cohere Compass"], DEEPSTACK),
    "Qwen2.5-Omni thinker": r"model\.visual\.merger\.mlp\.\d",
    "Qwen3-Omni MoE thinker": r"model\.visual\.(merger|merger_list\.\d)\.mlp\.\d",
    "Ovis2": r"model\.vision_tower\.head_linear",
    **dict.fromkeys(["MiniCPM-V 4.6", "MiniCPM-V 4.7", "MiniCPM-OCR"], r"model\.merger\.mlp\.\d\.linear_\d"),
    "Molmo2": r"model\.multi_modal_projector\.(image_pooling_2d\.[qkvo]_proj|image_projector\.(gate|up|down)_proj)",
    "Phi-4-multimodal": r"model\.embed_tokens_extend\.image_embed\.img_projection_(up|down)",
    **dict.fromkeys(["GLM-4.1V", "GLM-4.5V", "GLM-4.6V", "GLM-OCR", "GLM-GA", "GLM-5 Next"], GLM),
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
    "PaddleOCR-VL": r"model\.projector\.linear_\d",
    "LightOnOCR": r"model\.vision_projection\.(linear_\d|patch_merger\.merging_layer)",
    **dict.fromkeys(["GOT-OCR 2", "PP-Chart2Table"], r"model\.multi_modal_projector\.multimodal_projector"),
    "Granite Docling": r"model\.vision_model\.connector\.(mlp_fc2|coarse\..+)",
    "EXAONE 4.5": r"model\.visual\.merger\.mlp\.\d",
    "HyperCLOVA X Vision": r"model\.(projector|vision_model\.merger\.mlp\.\d)",
    "Aria": r"model\.multi_modal_projector\.(cross_attn|feed_forward)\.(?!multihead_attn).*",
    "Cosmos3-Edge": r"model\.projector\.linear_fc\d",
    **dict.fromkeys(["Muse Glimmer", "Muse Spark"], r"model\.(vision_adapter\.fc\d|vision_projection)"),
    "Inkling 2": r"model\.vision_tower\.merger\.linear_\d",
    "Dots 3": r"model\.vision_tower\.merger\.mlp\.\d",
}
LEFT_OUT = {  # linear layers of a decoder that are no attention and no MLP
    "Gemma 3n": r".*\.altup\..*",
    "Gemma 4 MoE": r".*\.router\.proj",
    **dict.fromkeys(["Llama 4", "Llama 4, short chunks"], r".*\.(router|lm_head)"),
    "Nemotron-H Omni": r".*\.lm_head",
    "Qwen3.5 MoE": r".*\.shared_expert_gate",
    "Qwen4-exp": r".*\.(shared_expert_gate|indexer\..*)",
    **dict.fromkeys(["MiniMax-M3-VL", "Dots 3", "GLM-5 Next"], r".*\.indexer\..*"),
    "Mistral Large 4": r".*\.(indexer|shared_experts)\..*",  # PEFT loads adapters of the latter elsewhere
    "Inkling 2": r".*\.weight_proj",  # of these, too
    "Phi-4-multimodal": r".*\.embed_tokens_extend\..*",
}
PARAMETERS = {name: {"model.multi_modal_projector"} for name in ("Gemma 3", "Gemma 3, short windows")}  # holds one


def names_of(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def adapt(model, preset, **more):
    config = LoraConfig(r=2, target_modules=preset, **more)
    resolve_targets(config, model)
    return get_peft_model(model, config)


def cases(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * NEWER[name].slow) for name in names]


@pytest.mark.filterwarnings("ignore:.*(experts|are not adapted)")
@pytest.mark.parametrize("name", cases(name for name, family in NEWER.items() if family.projector and family.adapter))
def test_presets_adapt_layers_that_are_reached(name, media):
    """One step over an image and a video, with padded rows: no adapter is left without a gradient."""
    torch.manual_seed(0)
    model, processor = NEWER[name].build()
    PartialState(cpu=True)
    decoder = {*model.get_decoder().modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    want = {n for n, m in linear.items() if m in decoder and not re.fullmatch(LEFT_OUT.get(name, ""), n)}
    want |= {n for n in linear if re.fullmatch(PROJECTORS.get(name, LINEAR), n)} | PARAMETERS.get(name, set())
    adapted = adapt(model, "language+projector")
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


@pytest.mark.filterwarnings("ignore:.*experts")
@pytest.mark.parametrize("name", ["Gemma 3", "GLM-4.5V"])
def test_parameters_of_a_preset_load_and_merge(name, media, tmp_path):
    """Gemma 3's projector, and the MLPs that PEFT takes for experts; in PEFT alone."""
    model, processor = build(name)
    tree = PreferenceCollator(processor).encode(row("image", media["image"][:1]))
    trunk, branch = tree.trunks[0], tree.branches[0]
    plain = slow_logits(model, trunk, branch)
    adapted = adapt(model, "language+projector")
    moved = [n for n, p in adapted.named_parameters() if ".lora_B." in n and ("mlp" in n or "projector.lora" in n)]
    for key in moved:
        torch.nn.init.normal_(adapted.get_parameter(key), std=0.1)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name)[0], tmp_path)
    with torch.no_grad():
        want, got = (slow_logits(m.eval(), trunk, branch) for m in (adapted, loaded))
        assert moved and torch.equal(got, want) and (want - plain).abs().max() > 0.01
        torch.testing.assert_close(slow_logits(loaded.merge_and_unload(), trunk, branch), want, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_would_not_load_is_refused(monkeypatch):
    """As one of Unlimited-OCR, whose weights PEFT renames as those of its checkpoints."""
    moved = {"^model.language_model.layers": "model.language_model.model.layers"}
    rule = [WeightRenaming(*item) for item in moved.items()]
    monkeypatch.setattr(transformers_weight_conversion, "get_model_conversion_mapping", lambda model: rule)
    with pytest.raises(RecipeError, match=r"an adapter of Glm4vMoeFor\w+ would not load: PEFT looks for its weights"):
        adapt(build("GLM-4.5V")[0], "language")


@pytest.mark.parametrize("targets", ["language", "all", ["q_proj", "v_proj"]])
def test_adapters_of_deepseek_ocr2_are_refused(targets):
    """In all layers of its decoder, or in those that a list names."""
    with pytest.raises(RecipeError, match=r"an adapter of .* would not load.*PEFT looks for its weights in"):
        check_adapted(adapt(build("DeepSeek-OCR 2")[0], targets))


def test_a_model_without_a_projector_has_one_preset():
    adapt(build("Emu3")[0], "language")
    with pytest.raises(RecipeError, match="Emu3ForConditionalGeneration has no projector that is known"):
        adapt(build("Emu3")[0], "language+projector")


def test_parameters_of_a_preset_have_no_dropout():
    with pytest.raises(RecipeError, match=r"Set lora_dropout: 0\.0, or name modules in the place of 'language\+proj"):
        adapt(build("Gemma 3")[0], "language+projector", lora_dropout=0.1)


@pytest.mark.filterwarnings("ignore:.*(experts|are not adapted)")
@pytest.mark.parametrize("name", ["Qwen2.5-Omni thinker", "Qwen3-Omni MoE thinker", "Janus", "Phi-4-multimodal"])
def test_all_is_what_rows_reach(name):
    """Not the towers of audio, nor what makes pictures."""
    names = names_of(adapt(NEWER[name].build()[0], "all"))
    assert any(re.search(r"visual\.|vision_model\.|img_processor\.", name) for name in names)
    assert not any(re.search("audio|generation|vqmodel", name) for name in names)
