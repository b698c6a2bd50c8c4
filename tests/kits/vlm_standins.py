"""Stand-ins for the vision-language models of TRL's DPO tests that families.py does not have."""

import families
import transformers as T
from families import (
    CLIP_PROCESSOR,
    CLIP_SIZE,
    PINPOINTS,
    SQUARE,
    _llava,
    _qwen,
    ids,
    template,
    text_of,
    tokenizer,
    tower,
)

GEMMA_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
WINDOWS = {"head_dim": 8, "sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}


def _gemma_tokenizer(named, image):
    tok = tokenizer(named.values(), named=named)
    tok.bos_token = "<|im_start|>"
    tok.chat_template = template(image)
    return tok, {f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in named.items()}


def gemma3():
    tok, numbers = _gemma_tokenizer(GEMMA_TOKENS, "<start_of_image>")
    images = T.Gemma3ImageProcessor(size=SQUARE, do_pan_and_scan=False)
    config = T.Gemma3Config(
        text_config=text_of(tok, query_pre_attn_scalar=8, **WINDOWS),
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        **{name.replace("_id", "_index"): number for name, number in numbers.items()},
        **ids(tok),
    )
    processor = T.Gemma3Processor(images, tok, image_seq_length=4, chat_template=tok.chat_template)
    return T.Gemma3ForConditionalGeneration(config), processor


def gemma4():
    """With what its small sizes have: embeddings of each layer, keys and values that layers share."""
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    named |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>"}
    tok, numbers = _gemma_tokenizer(named, "<|image|>")
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
    vision |= {"patch_size": 4, "pooling_kernel_size": 3}
    numbers["eoa_token_index"] = numbers.pop("eoa_token_id")
    config = T.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **numbers, **ids(tok))
    return T.Gemma4ForConditionalGeneration(config), processor


def llava_next():
    tok = tokenizer(["<image>"], named={"image_token": "<image>"})
    images = T.LlavaNextImageProcessor(**CLIP_SIZE, image_grid_pinpoints=PINPOINTS)
    processor = T.LlavaNextProcessor(images, tok, chat_template=template("<image>"), **CLIP_PROCESSOR)
    text = text_of(tok, "mistral", sliding_window=None)
    return _llava("LlavaNext", tok, text, image_grid_pinpoints=PINPOINTS), processor


def qwen3_5(kind="Qwen3_5", **more):
    text = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "head_dim": 16}
    text |= {"layer_types": ["linear_attention", "full_attention"], **more}
    return _qwen(kind, {}, "Qwen3VL", patch=16, rope={"partial_rotary_factor": 0.5}, text=text)


def qwen3_5_moe():
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return qwen3_5("Qwen3_5Moe", num_experts=4, num_experts_per_tok=2, **sizes)


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
