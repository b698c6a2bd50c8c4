"""Stand-ins for the vision-language models of TRL's DPO tests that tests/families.py does not have."""

import families
import transformers as T
from families import PINPOINTS, QWEN_TOWER, SQUARE, _qwen, ids, template, text_of, tokenizer, tower

GEMMA_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
WINDOWS = {"head_dim": 8, "sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}


def _gemma_tokenizer(named, image):
    tok = tokenizer(named.values(), named=named)
    tok.bos_token = "<|im_start|>"
    tok.chat_template = template(image)
    return tok, {name: tok.convert_tokens_to_ids(token) for name, token in named.items()}


def gemma3():
    tok, number = _gemma_tokenizer(GEMMA_TOKENS, "<start_of_image>")
    images = T.Gemma3ImageProcessor(size=SQUARE, do_pan_and_scan=False)
    config = T.Gemma3Config(
        text_config=text_of(tok, query_pre_attn_scalar=8, **WINDOWS),
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=number["image_token"],
        boi_token_index=number["boi_token"],
        eoi_token_index=number["eoi_token"],
        **ids(tok),
    )
    processor = T.Gemma3Processor(images, tok, image_seq_length=4, chat_template=tok.chat_template)
    return T.Gemma3ForConditionalGeneration(config), processor


def gemma4():
    """With what its small sizes have: embeddings of each layer, keys and values that layers share."""
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    named |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>"}
    tok, number = _gemma_tokenizer(named, "<|image|>")
    small = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3}
    parts = (T.Gemma4AudioFeatureExtractor(feature_size=16), T.Gemma4ImageProcessor(**small), tok)
    processor = T.Gemma4Processor(
        *parts, T.Gemma4VideoProcessor(**small), chat_template=tok.chat_template, image_seq_length=70
    )
    text = text_of(tok, **WINDOWS | {"layer_types": ["sliding_attention", "full_attention"] * 2})
    text |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 16}
    text |= {"vocab_size_per_layer_input": len(tok), "hidden_size_per_layer_input": 8}
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 12, "position_embedding_size": 128}
    config = T.Gemma4Config(
        text_config=text,
        vision_config=vision | {"patch_size": 4, "pooling_kernel_size": 3},
        audio_config=None,
        image_token_id=number["image_token"],
        video_token_id=number["video_token"],
        audio_token_id=number["audio_token"],
        boi_token_id=number["boi_token"],
        eoi_token_id=number["eoi_token"],
        boa_token_id=number["boa_token"],
        eoa_token_index=number["eoa_token"],
        **ids(tok),
    )
    return T.Gemma4ForConditionalGeneration(config), processor


def llava_next():
    tok = tokenizer(["<image>"], named={"image_token": "<image>"})
    processor = T.LlavaNextProcessor(
        T.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tok,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=template("<image>"),
    )
    config = T.LlavaNextConfig(
        vision_config=tower("clip_vision_model", projection_dim=24),
        text_config=text_of(tok, "mistral", sliding_window=None),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
    )
    return T.LlavaNextForConditionalGeneration(config), processor


def _qwen3_5(config, model, **more):
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "head_dim": 16}
    return _qwen(
        config,
        model,
        T.Qwen3VLProcessor,
        T.Qwen3VLVideoProcessor,
        {**QWEN_TOWER, "patch_size": 16, "num_position_embeddings": 16},
        patch=16,
        rope={"mrope_interleaved": True, "partial_rotary_factor": 0.5},
        text={**linear, "layer_types": ["linear_attention", "full_attention"], **more},
        video_size={"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64},
    )


def qwen3_5():
    return _qwen3_5(T.Qwen3_5Config, T.Qwen3_5ForConditionalGeneration)


def qwen3_5_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts["shared_expert_intermediate_size"] = 16
    return _qwen3_5(T.Qwen3_5MoeConfig, T.Qwen3_5MoeForConditionalGeneration, **experts)


VISION_MODELS = {  # name -> builder of (model, processor)
    "Gemma 3": gemma3,
    "Gemma 4": gemma4,
    "LLaVA-1.5": families.llava15,
    "LLaVA-NeXT": llava_next,
    "Qwen2-VL": families.qwen2_vl,
    "Qwen2.5-VL": families.qwen2_5_vl,
    "Qwen3-VL": families.qwen3_vl,
    "Qwen3.5": qwen3_5,
    "Qwen3.5-MoE": qwen3_5_moe,
}
