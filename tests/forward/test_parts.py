"""The names of a model's parts."""

import pytest
from families import FAMILIES, build

from trl_vpo.forward.parts import output_head, part_of

NAMES = {
    "language": [
        "model.language_model.layers.0.mlp.gate_proj",
        "model.text_model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "language_model.model.layers.3.feed_forward.router.weight",
        "model.language_model.per_layer_model_projection.weight",
        "model.layers.0.self_attn.qkv_proj",  # Phi-4-multimodal
        "lm_head.weight",
    ],
    "projector": [
        "model.visual.merger.mlp.0",
        "model.visual.merger_list.0.mlp.0",  # Qwen3-Omni
        "model.visual.deepstack_merger_list.0.linear_fc1",
        "model.vision_tower.patch_merger.mlp",  # Hunyuan-VL
        "model.vision_tower.head_linear",  # Ovis2
        "model.visual_embeddings_table.weight",
        "model.multi_modal_projector",  # Step-3, Mllama: a linear layer
        "model.multi_modal_projector.mm_input_projection_weight",  # Gemma 3: a parameter
        "model.embed_vision.embedding_projection",  # Gemma 3n, 4
        "model.mm_projector.in_proj",  # Kimi K2.5
        "model.projector.readout.0",  # VideoLLaMA 3
        "model.aligner.fc1",  # Janus, DeepSeek-VL
        "model.high_res_vision_alpha",
        "model.resampler_model.spatial_linear.fc1",  # ERNIE 4.5 VL
        "model.layerwise_projectors.0.qformer.layers.0.mlp.fc1",  # Granite 4 Vision
        "model.image_newline",
        "query_tokens",  # BLIP-2
        "model.embed_tokens_extend.image_embed.img_projection_up",  # Phi-4-multimodal
        "model.merger.mlp.0.linear_1",  # MiniCPM-V
    ],
    "vision": [
        "model.visual.blocks.0.attn.qkv",
        "model.vision_tower.vit_merger.linear_1",
        "model.high_res_vision_model.vision_encoder.layers.0.attn.qkv",
        "vision_model.model.layers.0.mlp.fc1",
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1",
    ],
    "idle": [
        "model.audio_tower.layers.0.fc1",
        "model.embed_audio.embedding_projection",
        "model.embed_tokens_extend.audio_embed.encoder.encoders.0.feed_forward_in.gate_up_proj",
        "model.generation_aligner.fc1",  # Janus makes pictures, too
        "model.vqmodel.encoder.conv_in",
    ],
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in NAMES for name in NAMES[part]])
def test_names_tell_the_part(part, name):
    assert part_of(name) == part


@pytest.mark.parametrize("family", FAMILIES)
def test_language_is_decoder_and_head(family):
    model, _ = build(family)
    inside = {*model.get_decoder().modules(), output_head(model)}
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) and name != "model":  # holds LLaVA-NeXT's newline
            assert (part_of(name) == "language") == (module in inside), name
